"""`examples/models/onnx_bert.py`: weights by name, and the outputs that the file has elsewhere."""

import struct

import data
import jax
import numpy as np
import pytest
from models import bert, onnx_bert


def number(x):
    """Seven bits a byte, the lowest first."""
    return bytes([x & 127 | 128, *number(x >> 7)]) if x > 127 else bytes([x])


def field(key, value):
    """A field of a message: a number, or bytes."""
    if isinstance(value, int):
        return number(key << 3) + number(value)
    return number(key << 3 | 2) + number(len(value)) + value


def tensor(name, x, dtype=1):
    """A weight of a graph."""
    sizes = b"".join(field(1, n) for n in x.shape)
    return field(5, sizes + field(2, dtype) + field(8, name) + field(9, x.tobytes()))


def node(layer, operator, *inputs):
    """A node of a graph."""
    return field(1, b"".join(field(1, x) for x in inputs) + field(3, layer) + field(4, operator))


def test_weights_by_name():
    """A matrix is named by its product, and lies as PyTorch has it; what is not read is passed."""
    x = np.arange(600, dtype=np.float32).reshape(2, 300)
    graph = [
        node(b"/model/model.0/auto_model/encoder/query/MatMul", b"MatMul", b"h", b"onnx::7"),
        node(b"/model/model.0/auto_model/encoder/query/Add", b"Add", b"h", b"bias"),
        tensor(b"onnx::7", x),
        tensor(b"model.0.auto_model.encoder.query.bias", x[0]),
    ]
    odd = number(9 << 3 | 1) + bytes(8) + number(10 << 3 | 5) + struct.pack("<f", 1.0)
    model = field(1, 8) + odd + field(2, b"pytorch") + field(7, b"".join(graph))
    found = onnx_bert.read_tensors(model)
    assert found.keys() == {"encoder.query.weight", "encoder.query.bias"}
    np.testing.assert_array_equal(found["encoder.query.weight"], x.T)
    np.testing.assert_array_equal(found["encoder.query.bias"], x[0])
    with pytest.raises(ValueError, match=r"`half` has the type \[10\]: expected \[1\], float32"):
        onnx_bert.read_tensors(field(7, tensor(b"half", x, dtype=10)))


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
