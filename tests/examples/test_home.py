"""`examples/home.py`: what is kept where changes no gradient, and the page has the longest rows."""

import functools
import pathlib

import home
import jax
import jax.numpy as jnp
import pytest
import tables
from laws import assert_close
from small import normal, randomize, set_up, some

import jlora

SHAPES = {
    "dense": home.Shape(3, 16, 32, 4, 2, 4, 48),
    "experts": home.Shape(2, 16, 8, 4, 2, 4, 48, tied=False, experts=4, chosen=2),
}
IDS = jax.random.randint(jax.random.key(0), (2, 13), 0, 48)


@pytest.mark.parametrize("kind", some(SHAPES))
def test_where_inputs_are_kept_changes_nothing(kind):
    """The values and gradients of layers that are computed again from the device or the host."""
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    shapes, attend = (
        home.weights(SHAPES[kind]),
        functools.partial(jax.nn.dot_product_attention, is_causal=True),
    )
    leaves, structure = jax.tree.flatten(shapes, is_leaf=is_shape)
    drawn = [normal(i, *s, dtype=jnp.float32) / 4 for i, s in enumerate(leaves)]
    params = jax.tree.unflatten(structure, drawn)

    def slope(saved):
        model = functools.partial(home.log_probs, SHAPES[kind], attend, saved)
        lora, base, adapter = set_up(model, jlora.LoRA("layers/[qkvo]", rank=2), params, IDS)
        f = jax.value_and_grad(lambda a, base: lora.apply(base, a, IDS).mean())
        traced = jax.jit(f).trace(randomize(adapter), base)
        return traced.lower().compile()(randomize(adapter), base), str(traced.jaxpr)

    (on_device, text), (on_host, other) = map(slope, home.SAVED)
    assert "device_put" not in text and "device_put" in other  # to the host and back
    assert_close(on_host, on_device, 1e-6, "offloaded")
    assert any(jnp.any(x != 0) for x in jax.tree.leaves(on_host[1]))


def test_the_pages_have_the_table():
    guides = pathlib.Path(home.__file__).parents[1] / "notebooks"
    rows = tables.read(home.HERE / "results" / "home.csv")
    assert home.table(rows) in (guides / "measurements" / "lengths.md").read_text(encoding="utf-8")
    small = home.table([row for row in rows if row["weights"] == "nf4"])
    assert small in (guides / "loops" / "home.md").read_text(encoding="utf-8")
