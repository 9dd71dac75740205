"""Notebooks are stored with what they print. The build of the site runs them and compares."""

import base64
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
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
@pytest.mark.parametrize("settings", ["jnp.float16, 3, 1024", "jnp.float32, 3, 1"])
def test_a_card_without_bfloat16_trains(settings, monkeypatch):
    """On 4 bits the losses are finite and fall; in float16 no gradient is rounded to zero."""
    cells = json.loads((FOLDER / "free.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"][:4]
    code[1] = (
        code[1]
        .replace("jnp.float32, 20", settings)
        .replace("DTYPE, STEPS =", "DTYPE, STEPS, SCALE =", 1)
    )
    monkeypatch.chdir(FOLDER)
    names = {}
    exec("\n".join(code), names)
    losses, batch = names["losses"], names["batch"]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    grads = jax.grad(names["loss_fn"])(names["adapter"], names["base"], batch)
    assert all(jnp.isfinite(g).all() and (g != 0).mean() > 0.99 for g in jax.tree.leaves(grads))
