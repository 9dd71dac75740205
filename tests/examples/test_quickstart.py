"""`examples/quickstart.py`, in a few steps: every piece runs and what it writes can be read.

Every day on one of MiniLM's layers.
"""

import data
import jax
import numpy as np
import pytest
import quickstart
import two_layers
from models import bert
from safetensors.numpy import load_file

from jlora import checkpoint


@pytest.fixture(scope="module", params=two_layers.ONE)
def run(tmp_path_factory, request):
    """The result and the output folder of a short run."""
    out = tmp_path_factory.mktemp("quickstart")
    (out / "adapter").mkdir()
    (out / "adapter" / "of_an_earlier_run").touch()
    argv = ["--steps", "4", "--batch", "8", "--rank", "2", "--held-out", "32", "--out", str(out)]
    with two_layers.minilm(tmp_path_factory.mktemp("minilm"), request.param):
        yield quickstart.main(argv), out


def test_reports_accuracies(run):
    result, _ = run
    assert all(0 <= x <= 1 for x in result)
    assert result.majority >= 0.5
    assert result.merged == pytest.approx(result.lora, abs=1 / 32)


def test_exports_an_ordinary_checkpoint(run):
    _, out = run
    names = sorted(path.name for path in (out / "merged").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    before = load_file(data.minilm() / "model.safetensors")
    after = load_file(out / "merged" / "model.safetensors")
    assert after.keys() == before.keys() | {"classifier.weight", "classifier.bias"}
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {
        f"encoder.layer.{i}.attention.self.{part}.weight"
        for i in range(bert.load(out / "merged")[0].num_hidden_layers)
        for part in ("query", "value")
    }


def test_the_saved_adapter_gives_the_exported_weights(run):
    _, out = run
    model, variables, _ = quickstart.load()
    lora = quickstart.adapt(model, rank=2)
    example = jax.ShapeDtypeStruct((1, 8), np.int32)
    base, like = lora.init(jax.random.key(1), variables, example, example)
    adapter = checkpoint.restore(out / "adapter", like=like, base=base)
    ids = np.arange(1000, 1016, dtype=np.int32).reshape(2, 8)
    _, params = bert.load(out / "merged")
    np.testing.assert_allclose(
        jax.jit(lora.apply)(base, adapter, ids, np.ones_like(ids)),
        jax.jit(model.apply)(params, ids, np.ones_like(ids)),
        atol=1e-5,
    )


def test_a_run_replaces_what_one_before_it_left(run):
    _, out = run
    assert checkpoint.read(out / "adapter").rules == quickstart.make_rules(rank=2)
