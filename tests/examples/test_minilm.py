"""`examples/quickstart.py` and `serve.py` in a few steps: what they write can be read.

Every day on one of MiniLM's layers, in the long run on all.
"""

import contextlib
import io
import json
import re
import shutil

import data
import numpy as np
import pytest
import quickstart
import serve
from models import bert
from safetensors.numpy import load_file, save_file

from jlora import checkpoint

STEPS, RANK = 4, quickstart.RANK


@pytest.fixture(scope="module", params=[1, pytest.param(6, marks=pytest.mark.slow)])
def layers(tmp_path_factory, request):
    """How many layers the MiniLM has that `data.minilm` gives meanwhile."""
    folder, whole, later = tmp_path_factory.mktemp("m"), data.minilm(), rf"\.[{request.param}-9]\."
    config = json.loads((whole / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": request.param}))
    shutil.copy(whole / "tokenizer.json", folder)
    tensors = load_file(whole / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if not re.search(later, name)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "minilm", lambda: folder)
        yield request.param


@pytest.fixture(scope="module")
def run(layers, tmp_path_factory):
    """The result, the output folder and the prints of a short run of the quickstart."""
    out = tmp_path_factory.mktemp("quickstart")
    (out / "adapter").mkdir()
    (out / "adapter" / "of_an_earlier_run").touch()
    argv = f"--steps {STEPS} --batch 8 --rank {RANK} --held-out 32 --out {out}"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = quickstart.main(argv.split())
    return result, out, printed.getvalue()


def test_what_is_reported_and_left_there(run, layers):
    """An ordinary checkpoint, of which only queries and values differ, and the adapter."""
    result, out, printed = run
    assert all(0 <= x <= 1 for x in result) and result.majority >= 0.5
    assert result.merged == pytest.approx(result.after, abs=1 / 32)  # of the restored adapter
    files = (data.minilm(), out / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in files)
    assert after.keys() == before.keys() | {"classifier.weight", "classifier.bias"}
    assert bert.load(out / "merged")[0].num_hidden_layers == layers
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {
        f"encoder.layer.{i}.attention.self.{part}.weight"
        for i in range(layers)
        for part in ("query", "value")
    }
    assert checkpoint.read(out / "adapter").rules == quickstart.make_rules(RANK)
    screen = printed[printed.index("right of 32 sentences") :]
    assert len(screen.splitlines()) <= 20 and all(f"{score:.1%}" in screen for score in result)
    held_out = {x.text: x.label for x in data.snippets(quickstart.SOURCE, quickstart.MARGIN)[1]}
    shown = re.findall(r"^  (positive|negative): (.*)$", screen, re.MULTILINE)
    assert all(held_out[text] == (label == "positive") for label, text in shown)


@pytest.mark.slow
def test_requests_are_answered_in_one_program(run, layers, tmp_path):
    """With adapters of an earlier run, of which one is trained first in the long run."""
    for name in (*serve.AT_FIRST[layers > 1 :], serve.LATER):
        shutil.copytree(run[1] / "adapter", tmp_path / "adapters" / f"{name}-{STEPS}")
    requests = serve.draw_requests((*serve.AT_FIRST, serve.LATER), 12)
    served = serve.main(f"--steps {STEPS} --each 12 --batch 3 --out {tmp_path}".split())
    assert served.compiled == 1
    assert [(x["adapter"], x["text"]) for x in served.answers] == [x[:2] for x in requests]
    assert {x["adapter"] for x in served.answers if "error" in x} == {serve.LATER}
    answered = [x for x in served.answers if "positive" in x]
    assert {x["adapter"] for x in answered} == {*serve.AT_FIRST, serve.LATER}
    assert all(0 <= x["positive"] <= 1 for x in answered)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == served.answers
