"""`examples/quickstart.py`, in a few steps: every piece runs and what it writes can be read.

Every day on one of MiniLM's layers.
"""

import data
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


def test_what_is_reported_and_left_there(run):
    """An ordinary checkpoint, of which only queries and values differ, and the adapter."""
    result, out = run
    assert all(0 <= x <= 1 for x in result) and result.majority >= 0.5
    assert result.merged == pytest.approx(result.lora, abs=1 / 32)  # of the restored adapter
    names = sorted(path.name for path in (out / "merged").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    files = (data.minilm(), out / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in files)
    assert after.keys() == before.keys() | {"classifier.weight", "classifier.bias"}
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {
        f"encoder.layer.{i}.attention.self.{part}.weight"
        for i in range(bert.load(out / "merged")[0].num_hidden_layers)
        for part in ("query", "value")
    }
    assert checkpoint.read(out / "adapter").rules == quickstart.make_rules(rank=2)
