"""DoRA on a mesh of eight devices, in float64.

The norms are over all inputs: where a mesh cuts those, their parts are added up, and nothing of W's
size is moved for it.
"""

import itertools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small import some

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

    def gain(base, adapter):
        return adapter["w"].lower(base["w"]).gain.value

    found = collectives(jax.jit(gain).lower(base, adapter).compile())
    assert found == [("all-reduce", LAYERS * ((RANK + 1) * OUTPUTS + RANK**2))]


def test_no_sum_where_outputs_are_cut():
    dora, (base, adapter), _, x = made(COLUMNS, MESHES[AxisType.Auto])
    x = jax.device_put(x, NamedSharding(MESHES[AxisType.Auto], P()))
    assert collectives(jax.jit(dora.apply).lower(base, adapter, x).compile()) == []


# ------------------------------------------------------------------------ the user's own shard_map


class Way(NamedTuple):
    """How a user's own `shard_map` brings W, A, B and m to each device.

    Attributes:
        of_w: the partition of W.
        of_adapter: that of the adapter, if it is not that of `sharding.specs`.
        gathered: over which axis of the mesh all is gathered, and to which type.
        varying: names of arrays that are made to vary.
        of_x: the partition of x, (layers, rows, inputs).
        of_y: that of the result, (layers, rows, outputs).
        refused: what of W the type does not show to be whole: its inputs, its outputs.
    """

    of_w: P
    of_adapter: P | None = None
    gathered: str | None = None
    varying: tuple[str, ...] = ()
    of_x: P = P(None, "d")
    of_y: P = P(None, "d")
    refused: tuple[str, ...] = ()


STACK, WHOLE, BOTH = P("d"), P(), ("inputs", "outputs")
BY_INPUTS = {"of_x": P(None, None, "d"), "of_y": P()}
BY_OUTPUTS = {"of_x": P(), "of_y": P(None, None, "d")}
BY_STACK = {"of_x": STACK, "of_y": STACK}
WAYS = {
    "replicated": Way(WHOLE),
    "all varying": Way(WHOLE, varying=("w", "a", "b", "m"), refused=BOTH),
    "base gathered": Way(ROWS, WHOLE, gathered="varying"),
    "base gathered, m varying": Way(ROWS, WHOLE, gathered="varying", varying=("m",)),
    "base gathered along columns": Way(COLUMNS, WHOLE, gathered="varying"),
    "rows gathered": Way(ROWS, gathered="varying", refused=("inputs",)),
    "rows gathered to whole": Way(ROWS, gathered="invarying"),
    "columns gathered": Way(COLUMNS, gathered="varying", refused=("outputs",)),
    "columns gathered to whole": Way(COLUMNS, gathered="invarying"),
    "stack gathered": Way(STACK, gathered="varying", refused=BOTH),
    "stack gathered to whole": Way(STACK, gathered="invarying"),
    "rows": Way(ROWS, **BY_INPUTS, refused=("inputs",)),
    "rows, m varying": Way(ROWS, varying=("m",), **BY_INPUTS, refused=("inputs",)),
    "columns": Way(COLUMNS, **BY_OUTPUTS, refused=("outputs",)),
    "columns, A varying": Way(COLUMNS, varying=("a",), **BY_OUTPUTS, refused=BOTH),
    "stack": Way(STACK, **BY_STACK, refused=BOTH),
}
SLOTS = jlora.Slots(2, (1,))
UNDER = {
    "LoRA": jlora.LoRA("w", rank=RANK),
    "DoRA": jlora.DoRA("w", rank=RANK),
    "LoRA of slots": jlora.LoRA("w", rank=RANK, slots=SLOTS),
    "DoRA of slots": jlora.DoRA("w", rank=RANK, slots=SLOTS),
}
# What a rule needs whole, and how it says so.
NEEDS = {
    "LoRA": {},
    "DoRA": {"inputs": "DoRA takes norms over all inputs of W"},
    "LoRA of slots": {"outputs": "its slots are parts of a whole axis of W"},
}
NEEDS["DoRA of slots"] = NEEDS["LoRA of slots"] | NEEDS["DoRA"]


def refusal(way, under):
    """The error of a rule in a `shard_map`, if it is one."""
    needs = [need for of, need in NEEDS[under].items() if of in way.refused]
    return needs and re.escape(
        f"'w' cannot be adapted here: {needs[0]}, and the shard_map around it may have cut W over "
        "the mesh axes 'd'."
    )


def gather(x, spec, to):
    """`x`, whole along each axis that `spec` cuts."""
    for i, name in enumerate(spec):
        x = x if name is None else lax.all_gather(x, name, axis=i, tiled=True, to=to)
    return x


def mapped(way, f, adapter, checked=True):
    """`f` of base, adapter and x on each device."""
    specs = {"w": way.of_w}
    places = jlora.sharding.specs({"w": way.of_adapter or way.of_w}, adapter)
    if way.of_adapter is not None:
        places = jax.tree.map(lambda _: P(), places)

    def own(base, adapter, x):
        if way.gathered:
            base = jax.tree.map(lambda v, s: gather(v, s, way.gathered), base, specs)
            adapter = jax.tree.map(lambda v, s: gather(v, s, way.gathered), adapter, places)
        if "w" in way.varying:
            base = {"w": lax.pcast(base["w"], "d", to="varying")}
        node = adapter["w"]
        names = [n for n in way.varying if n in node._fields]
        node = node._replace(**{n: lax.pcast(getattr(node, n), "d", to="varying") for n in names})
        y = f(base, {"w": node}, x)
        return lax.psum(y, "d") if way.of_y == P() else y

    return jax.shard_map(
        own,
        mesh=MESHES[AxisType.Auto],
        in_specs=(specs, places, way.of_x),
        out_specs=way.of_y,
        check_vma=checked,
    )


def problem(rule):
    """As many layers as devices: transform, base, adapter, input."""
    params, x = {"w": normal(0, 4, INPUTS, OUTPUTS)}, normal(1, 4, 4, INPUTS)
    lora = jlora.transform(model, rule)
    base, adapter = lora.init(jax.random.key(0), params, x)
    return lora, base, laws.randomize(adapter), x


# Of these each way out of `mapped` and each refusal every day.
DAILY = [
    *(("DoRA", False, way) for way in ("rows", "columns", "stack gathered to whole")),
    *(("LoRA of slots", False, way) for way in ("replicated", "columns, A varying")),
]


@pytest.mark.parametrize(
    ("under", "merged", "name"),
    [
        pytest.param(*row, marks=[] if row in DAILY else pytest.mark.slow)
        for row in itertools.product(UNDER, (False, True), WAYS)
    ],
)
def test_within_the_users_shard_map(under, merged, name):
    """As without it, or refused."""
    way, (lora, base, adapter, x) = WAYS[name], problem(UNDER[under])
    f = (lambda b, a, x: model(jlora.merge(b, a), x)) if merged else lora.apply
    inside = mapped(way, f, adapter)
    if message := refusal(way, under):
        with pytest.raises(NotImplementedError, match=message):
            inside(base, adapter, x)
        return
    actual = value_and_slope(lambda a: inside(base, a, x), adapter)
    expected = value_and_slope(lambda a: lora.apply(base, a, x), adapter)
    laws.assert_close(actual, expected, 1e-10)


@pytest.mark.parametrize("name", some(["replicated", "base gathered", "rows"], "rows"))
@pytest.mark.parametrize("under", some(UNDER, "DoRA"))
def test_what_a_shard_map_hides_is_refused(under, name):
    lora, base, adapter, x = problem(UNDER[under])
    f = mapped(WAYS[name], lora.apply, adapter, checked=False)
    if NEEDS[under]:
        with pytest.raises(NotImplementedError, match=r"check_vma=False, and jax.pmap, hide both"):
            f(base, adapter, x)
    else:
        laws.assert_close(f(base, adapter, x), lora.apply(base, adapter, x), 1e-10)


@pytest.mark.parametrize(
    "name", some(["replicated", "rows gathered", "rows gathered to whole"], "rows gathered")
)
def test_codes_within_the_users_shard_map(name):
    """All codes and scales, as of a quantized leaf that is cut there is no shape."""
    way, mesh = WAYS[name], MESHES[AxisType.Auto]
    params, x = {"w": normal(0, 64, 8)}, normal(1, 4, 64)
    dora = jlora.transform(lambda p, x: x @ p["w"], jlora.DoRA("w", rank=RANK))
    base, adapter = dora.init(jax.random.key(0), jlora.quantize(params, jlora.Int8("w")), x)
    adapter, spec = laws.randomize(adapter), {"w": P(*way.of_w[1:])}
    places = jlora.sharding.specs(spec, base), jlora.sharding.specs(spec, adapter)

    def own(base, adapter, x):
        whole = (base, adapter)
        if way.gathered:
            whole = jax.tree.map(lambda v, s: gather(v, s, way.gathered), whole, places)
        return dora.apply(*whole, x)

    f = jax.shard_map(own, mesh=mesh, in_specs=(*places, P("d")), out_specs=P("d"))
    if message := refusal(way, "DoRA"):
        with pytest.raises(NotImplementedError, match=message):
            f(base, adapter, x)
        return
    actual = value_and_slope(lambda a: f(base, a, x), adapter)
    expected = value_and_slope(lambda a: dora.apply(base, a, x), adapter)
    laws.assert_close(actual, expected, 1e-10)


@pytest.mark.parametrize("name", some(["rows", "columns", "stack"], "rows"))
def test_within_the_models_own_shard_map(name):
    """What the error advises for weights that are cut: the norms are taken outside."""
    way, (_, base, adapter, x) = WAYS[name], problem(UNDER["DoRA"])

    def parallel(p, x):
        def own(p, x):
            y = model(p, x)
            return lax.psum(y, "d") if name == "rows" else y

        return jax.shard_map(
            own,
            mesh=MESHES[AxisType.Auto],
            in_specs=({"w": way.of_w}, way.of_x),
            out_specs=way.of_y,
        )(p, x)

    both = [jlora.transform(f, UNDER["DoRA"]).apply for f in (parallel, model)]
    actual, expected = (value_and_slope(lambda a, f=f: f(base, a, x), adapter) for f in both)
    laws.assert_close(actual, expected, 1e-10)


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
