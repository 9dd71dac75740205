"""paraphrase-MiniLM-L3-v2 from an ONNX file: a BERT of three layers and 384 channels.

    config, variables = onnx_bert.load(data.paraphrase(), data.minilm())
    hidden = bert.Bert(config).apply(variables, ids, mask)     # (B, L, 384)

The file has no sizes and no tokenizer: those of all-MiniLM-L6-v2 fit, but for the number of layers.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from . import bert, hf

PREFIX = "model.0.auto_model."  # of the names


def load(path: str | Path, sizes: str | Path) -> tuple[bert.Config, dict[str, Any]]:
    """Config and variables.

    Args:
        path: the ONNX file.
        sizes: a folder with the `config.json` of a BERT that differs in the number of layers alone.
    """
    tensors = name_tensors(onnx.load(path).graph)
    layers = {found[1] for name in tensors if (found := re.search(r"layer\.(\d+)\.", name))}
    config = hf.read_config(sizes, bert.Config, bert.FIELDS, bert.KNOWN)
    return bert.from_hf(tensors, dataclasses.replace(config, num_hidden_layers=len(layers)))


def name_tensors(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """The weights of a model that PyTorch exported, by PyTorch's names and in its layout.

    A matrix of a linear layer is transposed there and has lost its name, which its product tells.
    """
    products = {}  # name of a matrix -> that of its layer
    for node in graph.node:
        if node.op_type == "MatMul":
            layer = node.name.strip("/").removeprefix("model/").rpartition("/")[0]
            products[node.input[1]] = f"{layer.replace('/', '.')}.weight"
    found = {}
    for tensor in graph.initializer:
        x = numpy_helper.to_array(tensor)
        name, x = (products[tensor.name], x.T) if tensor.name in products else (tensor.name, x)
        found[name.removeprefix(PREFIX)] = x
    return found
