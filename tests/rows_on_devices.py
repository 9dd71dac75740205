"""Rows on a mesh of eight devices, in float64.

The vocabulary may be cut: each device has its part of E, and the rows come from where they lie.
"""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from dora_on_devices import MESHES, collectives, normal, value_and_slope
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

VOCABULARY, DIM, NEW = 32, 8, (30, 3, 17)
VOCABULARY_CUT, DIM_CUT = P("d"), P(None, "d")
IDS = jnp.array([[3, 0, 30], [5, 17, 1]])


def model(p, ids):
    """A tied model, whose results are stated along explicit axes."""
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    table = p["table"]
    if not explicit:
        return jnp.tanh(table[ids]) @ table.T
    rows, dim = jax.typeof(table).sharding.spec
    h = jnp.tanh(table.at[ids].get(out_sharding=P(None, None, dim)))
    return jnp.einsum("bti,vi->btv", h, table, out_sharding=P(None, None, rows))


def made(spec, mesh):
    """Transform, base and adapter on a mesh, and the two as they were."""
    rows = jlora.transform(model, jlora.Rows("table", NEW))
    base, adapter = rows.init(jax.random.key(0), {"table": normal(0, VOCABULARY, DIM)}, IDS)
    whole = base, laws.randomize(adapter)
    places = {"table": spec}, jlora.sharding.specs({"table": spec}, adapter)
    put = lambda x, s: jax.device_put(np.asarray(x), NamedSharding(mesh, s))  # noqa: E731
    put = jax.tree.map(put, whole, places)
    return rows, put, whole


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (VOCABULARY_CUT, AxisType.Auto),
        pytest.param(DIM_CUT, AxisType.Explicit, marks=pytest.mark.slow),
        pytest.param(VOCABULARY_CUT, AxisType.Explicit, marks=pytest.mark.slow),
        pytest.param(DIM_CUT, AxisType.Auto, marks=pytest.mark.slow),
    ],
)
def test_on_a_mesh_is_as_on_one_device(spec, kind):
    rows, (base, adapter), whole = made(spec, MESHES[kind])
    expected = value_and_slope(lambda a: rows.apply(whole[0], a, IDS), whole[1])
    with jax.set_mesh(MESHES[kind]):
        ids = jax.device_put(IDS, NamedSharding(MESHES[kind], P()))
        actual = value_and_slope(lambda a: rows.apply(base, a, ids), adapter)
        merged = jlora.merge(base, adapter)["table"]
        started = rows.init(jax.random.key(0), base, ids)[1]["table"].v
    laws.assert_close(jax.device_get(actual), jax.device_get(expected), 1e-10)
    laws.assert_close(merged, jlora.merge(*whole)["table"], 1e-10)
    assert merged.sharding.is_equivalent_to(base["table"].sharding, 2)
    np.testing.assert_array_equal(started, whole[0]["table"][jnp.array(NEW)])


def test_nothing_of_the_table_is_moved():
    """Beside what the model itself does: the rows alone, and what is looked up of E."""
    mesh = MESHES[AxisType.Auto]
    rows, (base, adapter), _ = made(VOCABULARY_CUT, mesh)
    ids = jax.device_put(IDS, NamedSharding(mesh, P()))
    found = collectives(jax.jit(rows.apply).lower(base, adapter, ids).compile())
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert sum(size for _, size in found) <= IDS.size * (DIM + len(NEW)) + len(NEW) * DIM


@pytest.mark.parametrize("check", [True, False])
def test_a_part_of_the_table_is_refused(check):
    _, _, (base, adapter) = made(VOCABULARY_CUT, MESHES[AxisType.Auto])
    rows = jlora.transform(model, jlora.Rows("table", [3]))
    few = jax.tree.map(lambda v: v[:1], adapter)
    few = {"table": few["table"]._replace(rows=(3,))}  # within the part of each

    def inside(f):
        specs = {"table": VOCABULARY_CUT}, P(), P()
        how = {"in_specs": specs, "out_specs": P("d"), "check_vma": check}
        return jax.shard_map(f, mesh=MESHES[AxisType.Auto], **how)

    message = "'table' cannot be adapted here: Rows counts the rows of the whole table, and the"
    with pytest.raises(NotImplementedError, match=f"{message} .* over the mesh axes 'd'"):
        inside(rows.apply)(base, few, IDS)
    with pytest.raises(NotImplementedError, match=message):
        inside(lambda base, adapter, _: jlora.merge(base, adapter))(base, few, IDS)
    with pytest.raises(NotImplementedError, match=r"\('table'\) takes .*Call init outside of it"):
        inside(lambda base, _, ids: rows.init(jax.random.key(0), base, ids)[1])(base, few, IDS)


@pytest.mark.parametrize("to", ["varying", "invarying"])
def test_a_gathered_table(to):
    """Its type must say that it is whole."""
    rows, _, (base, adapter) = made(VOCABULARY_CUT, MESHES[AxisType.Auto])

    def own(base, adapter, ids):
        whole = jax.lax.all_gather(base["table"], "d", tiled=True, to=to)
        return rows.apply({"table": whole}, adapter, ids)

    ids, specs = jnp.arange(8).reshape(4, 2), ({"table": VOCABULARY_CUT}, P(), P("d"))
    f = jax.shard_map(own, mesh=MESHES[AxisType.Auto], in_specs=specs, out_specs=P("d"))
    if to == "varying":
        with pytest.raises(NotImplementedError, match="may have cut W over the mesh axes 'd'"):
            f(base, adapter, ids)
        return
    actual = value_and_slope(lambda a: f(base, a, ids), adapter)
    expected = value_and_slope(lambda a: rows.apply(base, a, ids), adapter)
    laws.assert_close(actual, expected, 1e-10)
