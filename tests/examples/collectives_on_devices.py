"""Collectives of real programs on eight devices."""

import jax
import jax.numpy as jnp
import pytest
from collectives import collectives, summary
from jax import lax
from jax.sharding import PartitionSpec as P

MESH = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,))
# What each device does with its two rows of three float32, and the bytes that it receives.
PROGRAMS = {
    "all-reduce": (lambda x: lax.psum(x, "x"), 2 * 24 * 7 // 8),
    "all-gather": (lambda x: lax.all_gather(x, "x").sum(0), 7 * 24),
    "collective-permute": (lambda x: lax.ppermute(x, "x", [(i, i ^ 1) for i in range(8)]), 24),
}


def compiled(f):
    """The text of `f` on every device's part of an array."""
    mapped = jax.shard_map(f, mesh=MESH, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    return jax.jit(mapped).lower(jnp.ones((16, 3), jnp.float32)).compile().as_text()


@pytest.mark.parametrize("kind", PROGRAMS)
@pytest.mark.parametrize("steps", [None, 5])
def test_a_collective(kind, steps):
    """Alone, and in a loop of some steps."""
    f, size = PROGRAMS[kind]
    loop = lambda x: lax.fori_loop(0, steps, lambda _, x: jnp.sin(f(x)), x)  # noqa: E731
    found = summary(collectives(compiled(loop if steps else f)))
    assert found[kind] == (steps or 1, (steps or 1) * size)


def test_none():
    assert summary(collectives(compiled(jnp.sin))) == {}
