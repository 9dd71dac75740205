"""`examples/models/onnx_bert.py`: weights by name, and the outputs that the file has elsewhere."""

import data
import jax
import numpy as np
import pytest
from models import bert, onnx_bert
from onnx import helper, numpy_helper


def test_weights_by_name():
    """A matrix is named by its product, and lies as PyTorch has it."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    own = "model.0.auto_model.encoder.query.bias"
    layer = "/model/model.0/auto_model/encoder/query"
    nodes = [
        helper.make_node("MatMul", ["h", "onnx::7"], ["y"], name=f"{layer}/MatMul"),
        helper.make_node("Add", ["y", own], ["z"], name=f"{layer}/Add"),
    ]
    weights = [numpy_helper.from_array(x, "onnx::7"), numpy_helper.from_array(x[0], own)]
    found = onnx_bert.name_tensors(helper.make_graph(nodes, "", [], [], weights))
    assert found.keys() == {"encoder.query.weight", "encoder.query.bias"}
    np.testing.assert_array_equal(found["encoder.query.weight"], x.T)
    np.testing.assert_array_equal(found["encoder.query.bias"], x[0])


@pytest.mark.slow  # 147 megabytes
def test_the_outputs_are_those_of_the_onnx_runtime():
    """Means over the tokens of two sentences, as onnxruntime 1.32 has them."""
    ids = np.zeros((2, 12), np.int32)
    ids[0, :9] = 101, 1037, 13940, 2466, 1010, 2092, 2409, 1012, 102  # A gripping story, well told.
    ids[1, :10] = 101, 1996, 5436, 3084, 2053, 3168, 2012, 2035, 1012, 102
    config, variables = onnx_bert.load(data.paraphrase(), data.minilm())
    assert config.num_hidden_layers == 3 and "classifier" not in variables["params"]
    hidden = jax.jit(bert.Bert(config).apply)(variables, ids, ids > 0)
    known = [
        [0.51459265, 0.03351089, 0.29145712, -0.07704938, -0.15939339, -0.19342713],
        [-0.11612133, -0.22190829, -0.14921533, 0.20755203, 0.4233834, -0.4077778],
    ]
    np.testing.assert_allclose(bert.pool(hidden, ids > 0)[:, :6], known, atol=2e-6)
