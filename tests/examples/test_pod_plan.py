"""What `examples/pod_plan.py` counts without a compiler for TPUs."""

import argparse
import math
import pathlib
import runpy

import flax.linen as nn
import jax
import jax.numpy as jnp
import pod
import pod_plan
import pytest
import tables
from jax.sharding import AbstractMesh, AxisType
from models.parts import RULES
from small import some

import jlora

ROOT = pathlib.Path(pod.__file__).parents[1]


def scanned(x, w):
    return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0]


# A function of (4, 8) and three (8, 8), and how many products of the two it computes.
PRODUCTS = [
    (lambda x, w: x @ w[0], 1),
    (lambda x, w: jax.jit(jnp.matmul)(x, w[0]) + x @ w[1], 2),
    (scanned, 3),
    (jax.checkpoint(scanned), 3),
    (jax.grad(lambda x, w: scanned(x, w).sum(), argnums=1), 9),
    (lambda x, w: x + w[0, 0], 0),
]


@pytest.mark.parametrize(("f", "products"), PRODUCTS)
def test_flops(f, products):
    jaxpr = jax.make_jaxpr(f)(jnp.ones((4, 8)), jnp.ones((3, 8, 8)))
    assert pod_plan.flops(jaxpr) == products * 2 * 4 * 8 * 8


MESH = AbstractMesh((1, 1), ("fsdp", "tensor"), (AxisType.Auto,) * 2)
LLAMA3 = tables.read(ROOT / "examples" / "results" / "pod_8b.csv")


@pytest.mark.parametrize("row", some(LLAMA3, LLAMA3[1]), ids=lambda row: row["step"])
def test_steps_of_llama_3_have_the_bytes_that_the_results_say(row):
    """All but the activations follows from shapes; `test_pod_tpu.py` has a peak."""
    [method] = [name for name, step in pod_plan.METHODS.items() if step == row["step"]]
    args = argparse.Namespace(shape="8b", rank=16, rows=1, length=2048)
    with jax.sharding.use_abstract_mesh(MESH), nn.logical_axis_rules(RULES):
        found = jlora.plan(*pod.plan_step(args, method, MESH), compile=False)
    exact = [round(getattr(found, part) / 1e9, 3) for part in pod_plan.PARTS[:-1]]
    assert exact == [row[part] for part in pod_plan.PARTS[:-1]]
    whole = sum(exact) + row["activations"]
    assert math.isclose(whole, row["peak"], abs_tol=0.01)


def test_the_first_picture_has_the_results():
    """The picture is what its script draws, and its description says the same."""
    names = runpy.run_path(str(ROOT / "notebooks" / "pictures" / "gains.py"))
    picture = ROOT / "notebooks" / "pictures" / "gains.svg"
    assert picture.read_text(encoding="utf-8") == names["draw"]()
    peaks = ", ".join(f"{name} {peak} GB" for name, peak in names["figures"]().items())
    sizes = ", ".join(f"{device} has {size} GB" for device, size in names["DEVICES"].items())
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"![Memory of a step of Llama 3 8B: {peaks}; {sizes}]" in text
