"""Trees whose leaves lie on a mesh of four devices: `init`, `merge`, and masks of dropout."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_trees import KEY, Setup, assert_close, normal, random, setup

import jlora


@pytest.fixture(autouse=True)
def float32() -> Any:
    """The numbers of `test_trees`."""
    with jax.enable_x64(False):
        yield


def mesh(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    """Two by two devices."""
    return jax.make_mesh((2, 2), ("data", "model"), (kind, kind), devices=jax.devices()[:4])


def sharded_setup() -> Setup:
    """The dict model with `up` over both axes, `down` over one."""
    s = setup()
    specs = {"up": P("data", "model"), "down": P(None, "model")}
    places = {k: NamedSharding(mesh(), specs[k]) for k in s.params}
    params = jax.device_put(jax.device_get(s.params), places)
    return s._replace(params=params, base=params)


def shardings(tree: Any) -> Any:
    """Where each leaf lies."""
    return jax.tree.map(lambda x: x.sharding, tree)


def test_merge_keeps_shardings() -> None:
    """Eagerly, back, compiled, and for an adapter that is on the mesh or on one device."""
    s = sharded_setup()
    everywhere = jax.device_put(s.adapter, NamedSharding(mesh(), P()))
    for adapter in (s.adapter, everywhere):
        merged = jlora.merge(s.base, adapter)
        assert shardings(merged) == shardings(s.params)
        assert shardings(jlora.unmerge(merged, adapter)) == shardings(s.params)
        assert_close(merged, jlora.merge(setup().base, setup().adapter))
    placed = jax.jit(jlora.merge, out_shardings=shardings(s.params))(s.base, everywhere)
    assert shardings(placed) == shardings(s.params)


def test_init_keeps_shardings() -> None:
    """The base is the user's; leaves trained in full lie as they do; outputs are as on one."""
    s = sharded_setup()
    lora = jlora.transform(s.f, jlora.LoRA("up", rank=2), jlora.Full("down"))
    base, adapter = lora.init(KEY, s.params, s.x)
    assert all(base[name] is s.params[name] for name in base)
    assert adapter["down"].sharding == s.params["down"].sharding
    assert_close(jax.jit(s.lora.apply)(s.base, s.adapter, s.x), s.lora.apply(*setup()[4:], s.x))


def test_init_under_jit_with_out_shardings() -> None:
    """Parameters that are made and adapted in one program never lie in one place."""
    s = sharded_setup()
    make = lambda key: s.lora.init(key, s.params, s.x)  # noqa: E731
    _, adapter = jax.eval_shape(make, KEY)
    replicated = NamedSharding(mesh(), P())
    out = (shardings(s.params), jax.tree.map(lambda _: replicated, adapter))
    made = jax.jit(make, out_shardings=out)(KEY)
    assert shardings(made) == out
    assert_close(made[1], s.adapter, 1e-6)


def test_merge_on_an_explicit_mesh() -> None:
    """Axes of explicit type keep theirs too."""
    m = mesh(AxisType.Explicit)
    with jax.set_mesh(m):
        w = jax.device_put(normal(1, 8, 8), NamedSharding(m, P("data", "model")))
        lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=2, init=random))
        base, adapter = lora.init(KEY, {"w": w}, jnp.ones((1, 8)))
        for merged in (jlora.merge(base, adapter), jax.jit(jlora.merge)(base, adapter)):
            assert merged["w"].sharding == w.sharding


def test_merge_does_not_commit_to_a_device() -> None:
    """Parameters that follow their data still do so when merged."""
    s = setup()
    x = jax.device_put(jnp.ones((4, 6)), NamedSharding(mesh(), P("data")))
    assert not s.params["up"].committed
    jax.jit(s.f)(s.params, x)
    jax.jit(s.f)(jlora.merge(s.base, s.adapter), x)


def test_merge_puts_full_leaves_where_the_base_lies() -> None:
    """Also from an adapter that was restored on the host."""
    s = sharded_setup()
    lora = jlora.transform(s.f, jlora.Full("up|down"))
    base, adapter = lora.init(KEY, s.params, s.x)
    merged = jlora.merge(base, jax.tree.map(np.asarray, adapter))
    assert shardings(merged) == shardings(s.params)


def test_dropout_masks_differ_by_shard() -> None:
    """Rows that lie on different devices have masks of their own, also inside of `shard_map`."""
    product = jax.shard_map(
        lambda w, x: x @ w, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P("data")
    )
    rule, x = jlora.LoRA("w", rank=2, dropout=0.5, init=random), jnp.ones((4, 64))
    lora = jlora.transform(lambda p, x: product(p["w"], x), rule)
    base, adapter = lora.init(KEY, {"w": jnp.ones((64, 4))}, x)
    rows = np.asarray(jax.jit(lora.apply)(base, jlora.dropout(adapter, KEY), x))
    assert len({row.tobytes() for row in rows}) == len(rows), "two shards drew one mask"
