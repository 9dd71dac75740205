"""DoRA and Rows on a mesh of eight devices, in float64: methods that look at all of W.

DoRA's norms are over all inputs: where a mesh cuts those, their parts are added up. The vocabulary
of Rows may be cut too. Nothing of W's size is moved for either.
"""

import functools
import itertools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import laws
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import (
    KINDS,
    adapter_of,
    assert_lies,
    compiled,
    lines,
    moved,
    normal,
    put,
    value_and_slope,
)
from small import some, some_rows

import jlora

LAYERS, INPUTS, OUTPUTS, RANK = 4, 16, 8, 2
KEY, LINES = jax.random.key(0), lines()
AUTO = LINES[AxisType.Auto]
ROWS, COLUMNS = P(None, "d"), P(None, None, "d")
VOCABULARY, DIM = P("d"), P(None, "d")
NEW, IDS = (30, 3, 17), jnp.array([[3, 0, 30], [5, 17, 1]])


def is_explicit():
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def model(p, x):
    """Layers of their own inputs, whose results are stated along explicit axes."""
    out = P(None, jax.typeof(p["w"]).sharding.spec[2]) if is_explicit() else None
    return lax.map(lambda wx: jnp.matmul(wx[1], wx[0], out_sharding=out), (p["w"], x))


def tied(p, ids):
    """A table that is looked up and multiplied with."""
    if not is_explicit():
        return jnp.tanh(p["w"][ids]) @ p["w"].T
    rows, dim = jax.typeof(p["w"]).sharding.spec
    h = jnp.tanh(p["w"].at[ids].get(out_sharding=P(None, None, dim)))
    return jnp.einsum("bti,vi->btv", h, p["w"], out_sharding=P(None, None, rows))


X = normal(1, LAYERS, 4, INPUTS)
SLOTS = jlora.Slots(2, (1,))
UNDER = {
    "LoRA": jlora.LoRA("w", rank=RANK),
    "DoRA": jlora.DoRA("w", rank=RANK),
    "LoRA of slots": jlora.LoRA("w", rank=RANK, slots=SLOTS),
    "DoRA of slots": jlora.DoRA("w", rank=RANK, slots=SLOTS),
    "DoRA of codes": jlora.DoRA("w", rank=RANK),
}


@functools.cache
def made(under):
    """Transform, base, adapter and input on one device."""
    if under == "Rows":
        lora, w, x = jlora.transform(tied, jlora.Rows("w", NEW)), normal(0, 32, 8), IDS
    else:
        lora, w, x = jlora.transform(model, UNDER[under]), normal(0, LAYERS, INPUTS, OUTPUTS), X
    params = {"w": w}
    if under.endswith("codes"):
        params = jlora.quantize(params, jlora.Int8("w"))
    return lora, params, adapter_of(lora, params, x), x


def placed(under, spec, kind=AxisType.Auto, of_x=None):
    """The same on a mesh."""
    lora, base, adapter, x = made(under)
    specs = {"w": spec}
    base, x = put(base, LINES[kind], specs), put(x, LINES[kind], of_x)
    return lora, base, put(adapter, LINES[kind], jlora.sharding.specs(specs, adapter)), x


PLACES = {"DoRA": (ROWS, COLUMNS), "Rows": (VOCABULARY, DIM)}
EVERY = [(under, spec, kind) for under in PLACES for spec in PLACES[under] for kind in KINDS]


@pytest.mark.parametrize(("under", "spec", "kind"), some_rows(EVERY, EVERY[1]))
def test_on_a_mesh_is_as_on_one_device(under, spec, kind):
    lora, whole, alone, x = made(under)
    expected = value_and_slope(lambda a: lora.apply(whole, a, x), alone)
    of_x = P(None, None, *spec[1:2]) if under == "DoRA" else P()
    _, base, adapter, x = placed(under, spec, kind, of_x)
    with jax.set_mesh(LINES[kind]):
        actual = value_and_slope(lambda a: lora.apply(base, a, x), adapter)
        merged = jlora.merge(base, adapter)
        start = lora.init(KEY, base, x)[1] if under == "Rows" else None
    laws.assert_close(jax.device_get(actual), jax.device_get(expected), 1e-10)
    laws.assert_close(merged, jlora.merge(whole, alone), 1e-10)
    assert_lies(merged, base)
    if start is not None:
        laws.assert_close(start, lora.init(KEY, whole, IDS)[1], 0)


def test_norms_cost_one_small_sum():
    """Row-parallel: (r + 1)·outputs + r² numbers a matrix, of all layers at once."""
    _, base, adapter, _ = placed("DoRA", ROWS)
    gain = lambda base, adapter: adapter["w"].lower(base["w"]).gain.value  # noqa: E731
    size = LAYERS * ((RANK + 1) * OUTPUTS + RANK**2)
    assert moved(compiled(gain, base, adapter)) == [("all-reduce", size)]


def test_no_sum_where_outputs_are_cut():
    dora, *args = placed("DoRA", COLUMNS)
    assert moved(compiled(dora.apply, *args)) == []


def test_nothing_of_the_table_is_moved():
    """Beside what the model itself does: the rows alone, and what is looked up of the table."""
    rows, *args = placed("Rows", VOCABULARY)
    found = moved(compiled(rows.apply, *args))
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert sum(size for _, size in found) <= IDS.size * (8 + len(NEW)) + len(NEW) * 8


# ------------------------------------------------------------------------ the user's own shard_map


class Way(NamedTuple):
    """How a user's own `shard_map` brings W, A, B and m to each device.

    Attributes:
        of_w: the partition of W.
        of_adapter: that of the adapter, if it is not that of `sharding.specs`.
        to: the type to which all is gathered, if it is.
        varying: names of arrays that are made to vary.
        of_x: the partition of x, (layers, rows, inputs).
        of_y: that of the result, (layers, rows, outputs).
        refused: what of W the type does not show to be whole: its inputs, its outputs.
    """

    of_w: P
    of_adapter: P | None = None
    to: str | None = None
    varying: tuple[str, ...] = ()
    of_x: P = P(None, "d")
    of_y: P = P(None, "d")
    refused: tuple[str, ...] = ()


STACK, WHOLE, BOTH = P("d"), P(), ("inputs", "outputs")
BY_INPUTS = {"of_x": P(None, None, "d"), "of_y": P()}
BY_OUTPUTS = {"of_x": P(), "of_y": P(None, None, "d")}
WAYS = {
    "replicated": Way(WHOLE),
    "all varying": Way(WHOLE, varying=("w", "a", "b", "m"), refused=BOTH),
    "base gathered": Way(ROWS, WHOLE, to="varying"),
    "base gathered, m varying": Way(ROWS, WHOLE, to="varying", varying=("m",)),
    "rows gathered": Way(ROWS, to="varying", refused=("inputs",)),
    "columns gathered": Way(COLUMNS, to="varying", refused=("outputs",)),
    "stack gathered": Way(STACK, to="varying", refused=BOTH),
    "rows gathered to whole": Way(ROWS, to="invarying"),
    "columns gathered to whole": Way(COLUMNS, to="invarying"),
    "stack gathered to whole": Way(STACK, to="invarying"),
    "rows": Way(ROWS, **BY_INPUTS, refused=("inputs",)),
    "columns": Way(COLUMNS, **BY_OUTPUTS, refused=("outputs",)),
    "columns, A varying": Way(COLUMNS, varying=("a",), **BY_OUTPUTS, refused=BOTH),
    "stack": Way(STACK, of_x=STACK, of_y=STACK, refused=BOTH),
}
# What a rule needs whole, and how it says so.
NORMS = {"inputs": "DoRA takes norms over all inputs of W"}
PARTS = {"outputs": "slots are parts of a whole axis of W"}
NEEDS = {
    "LoRA": {},
    "DoRA": NORMS,
    "LoRA of slots": PARTS,
    "DoRA of slots": PARTS | NORMS,
    "DoRA of codes": NORMS,
}


def gather(x, spec, to):
    """`x`, whole along each axis that `spec` cuts."""
    for i, name in enumerate(spec):
        x = x if name is None else lax.all_gather(x, name, axis=i, tiled=True, to=to)
    return x


def mapped(way, f, base, adapter, checked=True):
    """`f` of base, adapter and x on each device."""
    of_adapter = way.of_w if way.of_adapter is None else way.of_adapter
    specs, places = (
        jlora.sharding.specs({"w": spec}, tree)
        for spec, tree in ((way.of_w, base), (of_adapter, adapter))
    )

    def own(base, adapter, x):
        if way.to:
            whole = lambda v, spec: gather(v, spec, way.to)  # noqa: E731
            base, adapter = jax.tree.map(whole, (base, adapter), (specs, places))
        vary = functools.partial(lax.pcast, axis_name="d", to="varying")
        base = jax.tree.map(vary, base) if "w" in way.varying else base
        node = adapter["w"]
        names = [n for n in way.varying if n in node._fields]
        node = node._replace(**{n: vary(getattr(node, n)) for n in names})
        y = f(base, {"w": node}, x)
        return lax.psum(y, "d") if way.of_y == P() else y

    how = {"in_specs": (specs, places, way.of_x), "out_specs": way.of_y, "check_vma": checked}
    return jax.shard_map(own, mesh=AUTO, **how)


# Adapted by `apply`, by `merge`, and by `apply` where JAX does not check what varies.
HOW = {"applied": True, "merged": True, "unchecked": False}
# Codes whose weight is cut have no shape there, so that they come whole or are gathered.
OF_CODES = ("replicated", "rows gathered", "rows gathered to whole")
FEW = ("replicated", "base gathered", "rows")
CASES = [
    *itertools.product([u for u in UNDER if "codes" not in u], ("applied", "merged"), WAYS),
    *itertools.product([u for u in UNDER if "codes" not in u], ("unchecked",), FEW),
    *itertools.product(("DoRA of codes",), ("applied",), OF_CODES),
]
DAILY = [
    *(("DoRA", how, "rows") for how in HOW),
    ("DoRA", "applied", "columns"),
    ("LoRA of slots", "applied", "columns, A varying"),
    ("DoRA of codes", "applied", "rows gathered"),
]


def refusal(under, how, way):
    """What is said of a way that does not show that W is whole where the rule needs it so."""
    if not HOW[how]:
        return "(jax.pmap and check_vma=False hide it)" if NEEDS[under] else None
    needs = [need for of, need in NEEDS[under].items() if of in way.refused]
    around = "but the shard_map around it may have sharded W over the mesh axes 'd'."
    return f"'w' cannot be adapted here: {needs[0]}, {around}" if needs else None


@pytest.mark.parametrize(("under", "how", "name"), some_rows(CASES, *DAILY))
def test_within_the_users_shard_map(under, how, name):
    """As without it, or refused."""
    way, (lora, base, adapter, x) = WAYS[name], made(under)
    merged = lambda b, a, x: model(jlora.merge(b, a), x)  # noqa: E731
    inside = mapped(way, merged if how == "merged" else lora.apply, base, adapter, HOW[how])
    if message := refusal(under, how, way):
        with pytest.raises(NotImplementedError, match=re.escape(message)):
            jax.eval_shape(inside, base, adapter, x)
        return
    of = value_and_slope if HOW[how] else lambda f, a: jax.jit(f)(a)
    actual = of(lambda a: inside(base, a, x), adapter)
    laws.assert_close(actual, of(lambda a: lora.apply(base, a, x), adapter), 1e-10)


@pytest.mark.parametrize("name", some(["rows", "columns", "stack"], "rows"))
def test_within_the_models_own_shard_map(name):
    """What the error advises for weights that are cut: the norms are taken outside."""
    way, (dora, base, adapter, x) = WAYS[name], made("DoRA")

    def own(p, x):
        y = model(p, x)
        return lax.psum(y, "d") if name == "rows" else y

    specs = {"in_specs": ({"w": way.of_w}, way.of_x), "out_specs": way.of_y}
    parallel = jlora.transform(jax.shard_map(own, mesh=AUTO, **specs), UNDER["DoRA"])
    actual, expected = (
        value_and_slope(lambda a, f=f: f(base, a, x), adapter) for f in (parallel.apply, dora.apply)
    )
    laws.assert_close(actual, expected, 1e-10)


@pytest.mark.parametrize("check", [True, False])
def test_a_part_of_w_is_refused(check):
    """By Rows everywhere, by DoRA's start too."""

    def refused(message, f, w, *args):
        """Within a `shard_map` that cuts W as `w` says."""
        how = {"in_specs": ({"w": w}, P(), P()), "out_specs": P("d"), "check_vma": check}
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(jax.shard_map(f, mesh=AUTO, **how), *args)

    _, base, adapter, ids = made("Rows")
    few = jlora.transform(tied, jlora.Rows("w", [3]))  # within the part of each
    of_few = {"w": jax.tree.map(lambda v: v[:1], adapter)["w"]._replace(rows=(3,))}
    message = "'w' cannot be adapted here: Rows indexes the whole table, but the"
    refused(f"{message} .* over the mesh axes 'd'", few.apply, VOCABULARY, base, of_few, ids)
    refused(message, lambda b, a, _: jlora.merge(b, a), VOCABULARY, base, of_few, ids)
    start = lambda b, _, ids: few.init(KEY, b, ids)[1]  # noqa: E731
    refused(
        r"\('w'\) takes .*Call init outside of the shard_map", start, VOCABULARY, base, of_few, ids
    )
    dora, base, adapter, x = made("DoRA")
    start = lambda b, _, x: dora.init(KEY, b, x[..., :4])[1]  # noqa: E731
    refused(r"DoRA\('w'\) takes norms of the whole of 'w'", start, ROWS, base, adapter, x)


@pytest.mark.parametrize("to", ["varying", "invarying"])
def test_a_gathered_table(to):
    """Its type must say that it is whole."""
    rows, base, adapter, _ = made("Rows")

    def own(base, adapter, ids):
        return rows.apply({"w": gather(base["w"], VOCABULARY, to)}, adapter, ids)

    ids, specs = jnp.arange(8).reshape(4, 2), ({"w": VOCABULARY}, P(), P("d"))
    f = jax.shard_map(own, mesh=AUTO, in_specs=specs, out_specs=P("d"))
    if to == "varying":
        with pytest.raises(NotImplementedError, match="may have sharded W over the mesh axes 'd'"):
            jax.eval_shape(f, base, adapter, ids)
        return
    actual = value_and_slope(lambda a: f(base, a, ids), adapter)
    expected = value_and_slope(lambda a: rows.apply(base, a, ids), adapter)
    laws.assert_close(actual, expected, 1e-10)
