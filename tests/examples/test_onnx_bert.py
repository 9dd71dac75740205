"""`examples/models/onnx_bert.py`: weights by name, and the outputs that the file has elsewhere."""

import data
import jax
import numpy as np
import pytest
from models import bert, onnx_bert


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
