"""`lora.apply` within a `shard_map` of the user's own, with eight devices.

A and B may vary over other mesh axes than W does, and where JAX does not check what varies, only
what is known not to may be left as it is when W is gathered.
"""

import functools

import jax
import jax.numpy as jnp
import laws
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import adapter_of, lines, normal, value_and_slope
from small import some

import jlora

LORA = jlora.LoRA(rank=2, alpha=2)
map_on = functools.partial(jax.shard_map, mesh=lines()[AxisType.Auto])


def gathered(axis, spec, checked, scaled=False, cut=False):
    """A model that gathers its weight of (4, 8), and gives what each device has."""

    def body(w, x):
        i = lax.axis_index("d")
        w = w * (1.0 + i) if scaled else w
        w = lax.dynamic_slice_in_dim(w, 2 * i, 2, 1) if cut else w
        x = x[:, : w.shape[0] * (4 if axis == 0 else 1)]
        return (x @ lax.all_gather(w, "d", axis=axis, tiled=True))[None]

    f = map_on(body, in_specs=(spec, P()), out_specs=P("d"), check_vma=checked)
    return lambda p, x: f(p["w"], x)


# The arguments of `gathered`, the shapes of W and x, and whether A or B may vary there.
GATHERS = [
    ({"axis": 0, "spec": P("d")}, (4, 16), False),
    ({"axis": 1, "spec": P(None, "d")}, (4, 16), False),
    ({"axis": 0, "spec": P(None, "d")}, (8, 32), True),
    ({"axis": 1, "spec": P("d")}, (8, 32), True),
    ({"axis": 0, "spec": P(), "scaled": True}, (8, 32), True),
    ({"axis": 0, "spec": P(), "cut": True}, (8, 32), True),
]


@pytest.mark.parametrize("checked", some([True, False], True))
@pytest.mark.parametrize(("fields", "rows", "varies"), GATHERS)
def test_weights_gathered_by_the_model(fields, rows, varies, checked):
    """Adapted is merged where W is gathered along its shards; elsewhere it is refused."""
    model = gathered(**fields, checked=checked)
    base, x = {"w": normal(0, rows[0], 8)}, normal(1, 3, rows[1])
    lora = jlora.transform(model, LORA)
    if varies:
        message = "A or B lacks the gathered axis but may vary over the mesh axis of the gather"
        with pytest.raises(NotImplementedError, match=message):
            adapter_of(lora, base, x)
        return
    adapter = adapter_of(lora, base, x)
    actual = value_and_slope(lambda a: lora.apply(base, a, x), adapter)
    expected = value_and_slope(lambda a: model(jlora.merge(base, a), x), adapter)
    laws.assert_close(actual, expected, 1e-10)


def scanned(p, x, gather=lambda w: w):
    return lax.scan(lambda h, w: (jnp.tanh(h @ gather(w)), None), x, p["w"])[0]


def problem(columns, rows):
    """Transform, base, adapter and input of two layers."""
    lora = jlora.transform(scanned, LORA)
    base, x = {"w": normal(0, 2, columns, columns)}, normal(1, rows, columns)
    return lora, base, adapter_of(lora, base, x), x


@pytest.mark.parametrize("columns", some([4, 16], 4))
def test_weights_gathered_in_the_layers(columns):
    """As with FSDP: W, A and B lie as `sharding.specs` has them, one column a device too."""
    whole, base, adapter, x = problem(columns, 8)
    gather = functools.partial(lax.all_gather, axis_name="d", axis=1, tiled=True)
    lora = jlora.transform(functools.partial(scanned, gather=gather), LORA)
    spec = {"w": P(None, None, "d")}
    specs = (spec, jlora.sharding.specs(spec, adapter), P("d"))
    inside = map_on(lora.apply, in_specs=specs, out_specs=P("d"))
    actual = value_and_slope(lambda a: inside(base, a, x), adapter)
    expected = value_and_slope(lambda a: whole.apply(base, a, x), adapter)
    laws.assert_close(actual, expected, 1e-10)


def test_one_adapter_a_device():
    """Over a base that all share."""
    lora, base, adapter, x = problem(4, 3)
    many, x = jax.tree.map(lambda v: normal(v.size, 4, *v.shape), (adapter, x))

    def own(base, many, x):
        return lora.apply(base, jax.tree.map(lambda v: v[0], many), x[0])[None]

    f = map_on(own, in_specs=(P(), P("d"), P("d")), out_specs=P("d"))
    actual = value_and_slope(lambda a: f(base, a, x), many)
    expected = value_and_slope(lambda a: jax.vmap(lora.apply, (None, 0, 0))(base, a, x), many)
    laws.assert_close(actual, expected, 1e-10)
