"""DoRA on a mesh of eight devices, in float64.

The norms are over all inputs: where a mesh cuts those, their parts are added up, and nothing of W's
size is moved for it.
"""

import math
import re

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

LAYERS, INPUTS, OUTPUTS, RANK = 3, 16, 8, 2
ROWS, COLUMNS = P(None, "d"), P(None, None, "d")
MESHES = {
    kind: jax.make_mesh((4,), ("d",), (kind,), devices=jax.devices()[:4])
    for kind in (AxisType.Auto, AxisType.Explicit)
}
COLLECTIVE = re.compile(
    r"= (\S+|\([^)]*\)) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def model(p, x):
    """Layers of their own inputs, whose results are stated along explicit axes."""
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    out = P(None, jax.typeof(p["w"]).sharding.spec[2]) if explicit else None
    return jax.lax.map(lambda wx: jnp.matmul(wx[1], wx[0], out_sharding=out), (p["w"], x))


def made(spec, mesh):
    """Base, adapter and input on a mesh, and the two as they were."""
    params, x = {"w": normal(0, LAYERS, INPUTS, OUTPUTS)}, normal(1, LAYERS, 5, INPUTS)
    dora = jlora.transform(model, jlora.DoRA(rank=RANK))
    base, adapter = dora.init(jax.random.key(0), params, x)
    whole = base, laws.randomize(adapter)
    specs = {"w": spec}
    places = specs, jlora.sharding.specs(specs, adapter)
    put = lambda x, s: jax.device_put(np.asarray(x), NamedSharding(mesh, s))  # noqa: E731
    put = jax.tree.map(put, whole, places)
    return dora, put, whole, x


def value_and_slope(f, adapter):
    return jax.jit(jax.value_and_grad(lambda a: jnp.sin(f(a)).sum()))(adapter)


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (ROWS, AxisType.Auto),
        (COLUMNS, AxisType.Explicit),
        pytest.param(ROWS, AxisType.Explicit, marks=pytest.mark.slow),
        pytest.param(COLUMNS, AxisType.Auto, marks=pytest.mark.slow),
    ],
)
def test_on_a_mesh_is_as_on_one_device(spec, kind):
    dora, (base, adapter), whole, x = made(spec, MESHES[kind])
    expected = value_and_slope(lambda a: dora.apply(whole[0], a, x), whole[1])
    with jax.set_mesh(MESHES[kind]):
        x = jax.device_put(x, NamedSharding(MESHES[kind], P(None, None, *spec[1:2])))
        actual = value_and_slope(lambda a: dora.apply(base, a, x), adapter)
        merged = jlora.merge(base, adapter)["w"]
    laws.assert_close(jax.device_get(actual), jax.device_get(expected), 1e-10)
    laws.assert_close(merged, jlora.merge(*whole)["w"], 1e-10)
    assert merged.sharding.is_equivalent_to(base["w"].sharding, 3)


def collectives(compiled):
    """Kind and elements of each."""
    sizes = lambda shapes: [  # noqa: E731
        math.prod(map(int, s.split(","))) if s else 1 for s in re.findall(r"\[([\d,]*)\]", shapes)
    ]
    found = COLLECTIVE.findall(compiled.as_text())
    return sorted((kind, sum(sizes(shapes))) for shapes, kind in found)


def test_norms_cost_one_small_sum():
    """Row-parallel: (r + 1)·outputs + r² numbers a matrix, of all layers at once."""
    _, (base, adapter), _, _ = made(ROWS, MESHES[AxisType.Auto])
    method = jlora.adapters.method_of(adapter["w"])

    def gain(base, adapter):
        return method.lower(adapter["w"], base["w"]).gain.value

    found = collectives(jax.jit(gain).lower(base, adapter).compile())
    assert found == [("all-reduce", LAYERS * ((RANK + 1) * OUTPUTS + RANK**2))]


def test_no_sum_where_outputs_are_cut():
    dora, (base, adapter), _, x = made(COLUMNS, MESHES[AxisType.Auto])
    x = jax.device_put(x, NamedSharding(MESHES[AxisType.Auto], P()))
    assert collectives(jax.jit(dora.apply).lower(base, adapter, x).compile()) == []


@pytest.mark.parametrize("spec", [ROWS, pytest.param(COLUMNS, marks=pytest.mark.slow)])
def test_within_the_users_shard_map(spec):
    """W, A, B and m lie as `sharding.specs` has them."""
    mesh = MESHES[AxisType.Auto]
    dora, _, (base, adapter), x = made(spec, mesh)

    def own(base, adapter, x):
        y = dora.apply(base, adapter, x)
        return jax.lax.psum(y, "d") if spec == ROWS else y

    specs = {"w": spec}
    of_x, of_y = (P(None, None, "d"), P()) if spec == ROWS else (P(), P(None, None, "d"))
    f = jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(specs, jlora.sharding.specs(specs, adapter), of_x),
        out_specs=of_y,
    )
    actual = value_and_slope(lambda a: f(base, a, x), adapter)
    expected = value_and_slope(lambda a: dora.apply(base, a, x), adapter)
    laws.assert_close(actual, expected, 1e-10)


def test_what_a_shard_map_hides_is_refused():
    dora, _, (base, adapter), x = made(ROWS, MESHES[AxisType.Auto])
    f = jax.shard_map(
        dora.apply,
        mesh=MESHES[AxisType.Auto],
        in_specs=P(),
        out_specs=P(),
        check_vma=False,
    )
    with pytest.raises(NotImplementedError, match="hides whether it has cut them"):
        f(base, adapter, x)


def test_init_of_a_part_is_refused():
    dora, _, (base, _), x = made(ROWS, MESHES[AxisType.Auto])
    f = jax.shard_map(
        lambda base: dora.init(jax.random.key(0), base, x[..., :4])[1],
        mesh=MESHES[AxisType.Auto],
        in_specs=P(None, "d"),
        out_specs=P(),
    )
    with pytest.raises(NotImplementedError, match=r"DoRA\(\) takes norms of the whole of 'w'"):
        f(base)
