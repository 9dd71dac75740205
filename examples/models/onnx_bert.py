"""paraphrase-MiniLM-L3-v2 from an ONNX file: a BERT of three layers and 384 channels.

    config, variables = onnx_bert.load(data.paraphrase(), data.minilm())
    hidden = bert.Bert(config).apply(variables, ids, mask)     # (B, L, 384)

The file has no sizes and no tokenizer: those of all-MiniLM-L6-v2 fit, but for the number of layers.
"""

import collections
import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from . import bert, hf

PREFIX = "model.0.auto_model."  # of the names
FLOAT = 1  # the number of float32
# Fields of the messages, by their numbers in onnx.proto.
GRAPH, NODE, INITIALIZER = 7, 1, 5  # of a model; of a graph
INPUTS, NODE_NAME, OPERATOR = 1, 3, 4  # of a node
DIMS, DTYPE, NAME, RAW = 1, 2, 8, 9  # of a tensor


def load(path: str | Path, sizes: str | Path) -> tuple[bert.Config, dict[str, Any]]:
    """Config and variables.

    Args:
        path: the ONNX file.
        sizes: a folder with the `config.json` of a BERT that differs in the number of layers alone.
    """
    tensors = read_tensors(Path(path).read_bytes())
    layers = {found[1] for name in tensors if (found := re.search(r"layer\.(\d+)\.", name))}
    config = hf.read_config(sizes, bert.Config, bert.FIELDS, bert.KNOWN)
    return bert.from_hf(tensors, dataclasses.replace(config, num_hidden_layers=len(layers)))


def read_tensors(model: bytes) -> dict[str, np.ndarray]:
    """The weights of a model that PyTorch exported, by PyTorch's names and in its layout.

    A matrix of a linear layer is transposed there and has lost its name, which its product tells.

    Raises:
        ValueError: a weight is not float32.
    """
    graph = read_message(read_message(memoryview(model))[GRAPH][0])
    products = {}  # name of a matrix -> that of its layer
    for node in map(read_message, graph[NODE]):
        if bytes(node[OPERATOR][0]) == b"MatMul":
            layer = _text(node[NODE_NAME][0]).strip("/").removeprefix("model/").rpartition("/")[0]
            products[_text(node[INPUTS][1])] = f"{layer.replace('/', '.')}.weight"
    found = {}
    for tensor in map(read_message, graph[INITIALIZER]):
        name = _text(tensor[NAME][0])
        if tensor[DTYPE] != [FLOAT]:
            raise ValueError(f"`{name}` has the type {tensor[DTYPE]}: expected [{FLOAT}], float32.")
        x = np.frombuffer(tensor[RAW][0], "<f4").reshape(tensor[DIMS])
        name, x = (products[name], x.T) if name in products else (name, x)
        found[name.removeprefix(PREFIX)] = x
    return found


def read_message(message: memoryview) -> dict[int, list[Any]]:
    """The values of a message of protocol buffers, by the numbers of their fields."""
    found, i = collections.defaultdict(list), 0
    while i < len(message):
        key, i = _read_number(message, i)
        field, kind = key >> 3, key & 7
        if kind == 0:
            value, i = _read_number(message, i)
        else:
            size, i = _read_number(message, i) if kind == 2 else ({1: 8, 5: 4}[kind], i)
            value, i = message[i : i + size], i + size
        found[field].append(value)
    return found


def _read_number(message: memoryview, i: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        value |= (message[i] & 127) << shift
        shift, i = shift + 7, i + 1
        if message[i - 1] < 128:
            return value, i


def _text(x: memoryview) -> str:
    return bytes(x).decode()
