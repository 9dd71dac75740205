"""Notebooks are stored with what they print. The build of the site runs them and compares."""

import base64
import json
import pathlib
import re
import sys
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
sys.path.insert(0, str(FOLDER))

import outputs  # noqa: E402


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_small_and_the_same_everywhere(path):
    """No progress, warnings, counts of runs, paths of a machine, or large pictures."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    kept = [x for cell in cells for x in cell["outputs"]]
    assert kept and {cell["execution_count"] for cell in cells} == {None}
    assert {x.get("name", "stdout") for x in kept} == {"stdout"}
    pictures = [x["data"]["image/png"] for x in kept if "image/png" in x.get("data", {})]
    assert all(len(base64.b64decode(x)) < 60_000 for x in pictures)
    assert not re.search(r"(^|[\s'\"(=])/\w+/|\d(it/s|s/it)|0x\w{6}", outputs.text_of(kept))


@pytest.mark.slow
def test_a_card_without_bfloat16_trains(tmp_path, monkeypatch):
    """As a CPU does, in float32 alone: on 4 bits the losses are finite and fall."""
    cells = json.loads((FOLDER / "free.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == 6
    code = "\n".join(code).replace("jax.devices()[0]", "T4").replace("200  # a T4", "40")
    monkeypatch.chdir(tmp_path)  # which has no `model`: a tiny one
    names: dict[str, Any] = {"T4": SimpleNamespace(platform="gpu", compute_capability="7.5")}
    exec(code, names)
    losses, given = names["losses"], [names[x] for x in ("adapter", "state", "base", "batch")]
    assert len(losses) == 40 and np.isfinite(losses).all() and losses[-1] < 0.95 * losses[0], losses
    assert not re.search(r"\b(bf16|f16)\[", str(jax.make_jaxpr(names["step"])(*given)))
