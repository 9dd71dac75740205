"""`lora.apply` within a `shard_map` of the user's own, with eight devices.

A and B may vary over other mesh axes than W does, and where JAX does not check what varies, only
what is known not to may be left as it is when W is gathered.
"""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jlora

MESH = jax.make_mesh((4,), ("d",), (AxisType.Auto,), devices=jax.devices()[:4])
REFUSED = "A or B may vary over the mesh axis of the gather"


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def value_and_slope(f, adapter):
    return jax.jit(jax.value_and_grad(lambda a: jnp.sin(f(a)).sum()))(adapter)


def check(model, params, x):
    """Adapted is merged."""
    lora = jlora.transform(model, jlora.LoRA(rank=2, alpha=2))
    base, adapter = lora.init(jax.random.key(0), params, x)
    adapter = laws.randomize(adapter)
    actual = value_and_slope(lambda a: lora.apply(base, a, x), adapter)
    expected = value_and_slope(lambda a: model(jlora.merge(base, a), x), adapter)
    laws.assert_close(actual, expected, 1e-10)


def gathered(axis, spec, checked, scaled=False, cut=False):
    """A model that gathers its weight of (4, 8), and gives what each device has."""

    def body(w, x):
        i = lax.axis_index("d")
        w = w * (1.0 + i) if scaled else w
        w = lax.dynamic_slice_in_dim(w, 2 * i, 2, 1) if cut else w
        return (
            x[:, : w.shape[0] * (4 if axis == 0 else 1)]
            @ lax.all_gather(w, "d", axis=axis, tiled=True)
        )[None]

    return lambda p, x: jax.shard_map(
        body, mesh=MESH, in_specs=(spec, P()), out_specs=P("d"), check_vma=checked
    )(p["w"], x)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize(
    ("axis", "spec"), [(0, P("d")), pytest.param(1, P(None, "d"), marks=pytest.mark.slow)]
)
def test_gathered_along_its_shards(axis, spec, checked):
    check(gathered(axis, spec, checked), {"w": normal(0, 4, 8)}, normal(1, 3, 16))


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {"axis": 0, "spec": P(None, "d")},
        {"axis": 1, "spec": P("d")},
        {"axis": 0, "spec": P(), "scaled": True},
        {"axis": 0, "spec": P(), "cut": True},
    ],
)
def test_gathered_where_a_factor_varies_is_refused(fields, checked):
    model = gathered(**fields, checked=checked)
    with pytest.raises(NotImplementedError, match=REFUSED):
        check(model, {"w": normal(0, 8, 8)}, normal(1, 3, 32))


def scanned(p, x, gather=lambda w: w):
    return lax.scan(lambda h, w: (jnp.tanh(h @ gather(w)), None), x, p["w"])[0]


@pytest.mark.parametrize("columns", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_weights_gathered_in_the_layers(columns):
    """As with FSDP: W, A and B lie as `sharding.specs` has them, one column a device too."""
    gather = functools.partial(lax.all_gather, axis_name="d", axis=1, tiled=True)
    lora = jlora.transform(functools.partial(scanned, gather=gather), jlora.LoRA(rank=2))
    whole = jlora.transform(scanned, jlora.LoRA(rank=2))
    params, x = {"w": normal(0, 2, columns, columns)}, normal(1, 8, columns)
    base, adapter = whole.init(jax.random.key(0), params, x)
    adapter = laws.randomize(adapter)
    spec = {"w": P(None, None, "d")}
    inside = jax.shard_map(
        lora.apply,
        mesh=MESH,
        in_specs=(spec, jlora.sharding.specs(spec, adapter), P("d")),
        out_specs=P("d"),
    )
    actual = value_and_slope(lambda a: inside(base, a, x), adapter)
    expected = value_and_slope(lambda a: whole.apply(base, a, x), adapter)
    laws.assert_close(actual, expected, 1e-10)


def test_one_adapter_a_device():
    """Over a base that all share."""
    lora = jlora.transform(scanned, jlora.LoRA(rank=2))
    params, x = {"w": normal(0, 2, 4, 4)}, normal(1, 4, 3, 4)
    base, adapter = lora.init(jax.random.key(0), params, x[0])
    many = laws.randomize(jax.tree.map(lambda v: jnp.stack([v] * 4), adapter))

    def own(base, many, x):
        return lora.apply(base, jax.tree.map(lambda v: v[0], many), x[0])[None]

    f = jax.shard_map(own, mesh=MESH, in_specs=(P(), P("d"), P("d")), out_specs=P("d"))
    actual = value_and_slope(lambda a: f(base, a, x), many)
    expected = value_and_slope(lambda a: jax.vmap(lora.apply, (None, 0, 0))(base, a, x), many)
    laws.assert_close(actual, expected, 1e-10)
