"""`examples/models/bert.py` against transformers' Flax BERT, with real weights of MiniLM's.

Every day with two of its layers.
"""

import functools
import warnings

import jax
import numpy as np
import pytest
import two_layers
from models import bert, hf
from safetensors.numpy import load_file


@pytest.fixture(scope="module", params=two_layers.LAYERS)
def folder(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("minilm")
    with two_layers.minilm(folder, request.param):
        yield folder


@pytest.fixture(scope="module")
def minilm(folder):
    return bert.load(folder)


@pytest.fixture(scope="module")
def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def batch():
    """Random tokens of both types, ``(4, 24)``, with paddings of every kind."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 30000, (4, 24)).astype(np.int32)
    types = rng.integers(0, 2, (4, 24)).astype(np.int32)
    mask = (np.arange(24) < np.array([[24], [9], [1], [17]])).astype(np.int32)
    return ids, mask, types


# ---- the computation ----------------------------------------------------------------------------


@functools.cache
def compiled(config, **options):
    """The model, which takes the variables first."""
    return jax.jit(bert.Bert(config, **options).apply)


def test_agrees_with_transformers(folder, minilm, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers deprecates its Flax models
        from transformers import FlaxBertModel

        reference = FlaxBertModel.from_pretrained(folder)
    ids, mask, types = batch
    apply = jax.jit(lambda params: reference(ids, mask, types, params=params).last_hidden_state)
    expected = apply(reference.params)
    config, variables = minilm
    hidden = compiled(config)(variables, ids, mask, types)
    seen = mask[..., None] > 0
    assert hidden.shape == expected.shape == (4, 24, 384)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(hidden * seen, expected * seen, rtol=0, atol=1e-5)


# ---- checkpoints --------------------------------------------------------------------------------


def tensors_of(minilm_like):
    config, variables = minilm_like
    return hf.to_tensors(variables, bert.names(config))


def test_scanned_is_the_same_file_and_the_same_function(folder, minilm, batch, tmp_path):
    config, variables = bert.load(folder, scan=True)
    bert.save(tmp_path / "model.safetensors", variables, config)
    expected = (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "model.safetensors").read_bytes() == expected
    hidden = compiled(config, scan=True)(variables, *batch)
    np.testing.assert_allclose(hidden, compiled(config)(minilm[1], *batch), atol=1e-5)


def test_files_without_buffers_and_pooler(minilm, tensors):
    unused = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
    assert sorted(minilm[1]["unused"]) == sorted(unused)
    fewer = {name: x for name, x in tensors.items() if name not in unused}
    assert same(tensors_of(bert.from_hf(fewer, minilm[0])), fewer)


def test_every_misfit_is_listed(minilm, tensors):
    wrong = dict(tensors)
    del wrong["encoder.layer.1.attention.self.query.weight"]
    wrong["encoder.layer.7.output.dense.bias"] = np.zeros(384, np.float32)
    wrong["embeddings.LayerNorm.bias"] = np.zeros(383, np.float32)
    wrong["encoder.layer.0.output.dense.weight"] = np.zeros((1536, 384), np.float32)  # transposed
    with pytest.raises(ValueError) as error:
        bert.from_hf(wrong, minilm[0])
    assert str(error.value) == (
        "`tensors` do not fit `like`. 4 problems:\n"
        "  encoder.layer.1.attention.self.query.weight: missing, of shape (384, 384)\n"
        "  embeddings.LayerNorm.bias: expected shape (384,), got (383,)\n"
        "  encoder.layer.0.output.dense.weight: expected shape (384, 1536), got (1536, 384)\n"
        "  encoder.layer.7.output.dense.bias: unexpected, of shape (384,)"
    )


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(
        np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in b
    )
