"""Quantized bases on a mesh of eight devices, in float64.

Whatever the mesh, a step gives what it gives on one device on the weights that the codes stand for.

By hand: XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_ENABLE_X64=1 pytest -n 0 FILE
"""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
import test_base_files as base_files
from collectives import collectives
from jax import lax
from jax.sharding import AxisType, NamedSharding, reshard
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

import jlora
from jlora import FP8, NF4, Int4, Int8, peft, sharding

LAYERS, D, F, ROWS = 3, 256, 128, 8


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), (kind, kind))


AUTO, EXPLICIT = map(mesh_of, (AxisType.Auto, AxisType.Explicit))
UP, DOWN = P("fsdp", "tensor"), P("tensor", "fsdp")
SPECS = {"up": UP, "down": DOWN}
STACKED = {name: P(None, *spec) for name, spec in SPECS.items()}
SCHEMES = [
    NF4("up|down"),
    NF4("up|down", double=False),
    Int8("up|down"),
    Int8("up|down", block=32),
    FP8("up|down", block=64),
    FP8("up|down", block=None),
    Int4("up|down", group=32),
]


def entry(*values):
    """A case, in the long run unless it is of NF4 with scales of scales."""
    return pytest.param(*values, marks=[] if values[0] == SCHEMES[0] else pytest.mark.slow)


schemes = pytest.mark.parametrize("scheme", list(map(entry, SCHEMES)), ids=str)
THREE = [SCHEMES[0], SCHEMES[2], SCHEMES[6]]
FEW = pytest.mark.parametrize("scheme", list(map(entry, THREE)), ids=str)


def all_and_few(name, of_all, of_few):
    """Every scheme with `of_all` as `name`, in the long run, and three with `of_few`."""
    long = [pytest.param(s, of_all, marks=pytest.mark.slow) for s in SCHEMES]
    cases = [*long, *(entry(s, of_few) for s in THREE)]
    return pytest.mark.parametrize(("scheme", name), cases, ids=str)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape)) / 8


def layer(w, x):
    return x + jnp.tanh(x @ w["up"]) @ w["down"]


def scanned(layer):
    return lambda p, x: lax.scan(lambda x, w: (layer(w, x), None), x, p)[0]


@functools.cache
def problem(scheme, stacked=False):
    """Transform, quantized base, adapter and input on one device, and where weights lie."""
    lead = (LAYERS,) if stacked else ()
    params = {"up": normal(0, *lead, D, F), "down": normal(1, *lead, F, D)}
    x = normal(2, ROWS, D)
    lora = jlora.transform(scanned(layer) if stacked else layer, jlora.LoRA(rank=2))
    base, adapter = lora.init(jax.random.key(0), jlora.quantize(params, scheme), x)
    return lora, base, laws.randomize(adapter), x, STACKED if stacked else SPECS


def on_mesh(mesh, base, adapter, x, specs):
    """All of it on a mesh, by the partitions of the dense weights."""
    return (
        jax.device_put(jax.device_get(base), sharding.specs(specs, base, mesh)),
        jax.device_put(jax.device_get(adapter), sharding.specs(specs, adapter, mesh)),
        jax.device_put(jax.device_get(x), NamedSharding(mesh, P("fsdp"))),
    )


def lies_as(tree, places):
    """Whether each array lies where `places` has it."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
    return all(x.sharding.is_equivalent_to(place, x.ndim) for x, place in pairs)


def step(lora, brought=lambda base: base):
    """Outputs, and their slope along the adapter, of (adapter, base, x)."""
    return jax.jit(laws.value_and_slope(lambda a, b, x: lora.apply(brought(b), a, x)))


@functools.cache
def on_one(scheme, stacked=False):
    """What a step gives on one device on dequantized weights."""
    lora, base, adapter, x, _ = problem(scheme, stacked)
    expected = step(lora)(adapter, jlora.dequantize(base), x)
    assert np.abs(expected[0][0]).max() > 0.1
    return expected


def check(model, scheme, stacked=False, mesh=AUTO, brought=lambda base, specs: base):
    """`model` on the mesh, of layers however they are written, gives what they do on one device."""
    _, base, adapter, x, specs = problem(scheme, stacked)
    expected = on_one(scheme, stacked)
    base, adapter, x = on_mesh(mesh, base, adapter, x, specs)
    ours = jlora.transform(model, jlora.LoRA(rank=2))
    with jax.set_mesh(mesh):
        f = step(ours, lambda base: brought(base, specs)).lower(adapter, base, x).compile()
        laws.assert_close(f(adapter, base, x), expected, 1e-5)
    return f.as_text()


# ----------------------------------------------------------------------------------- automatic axes


def gathered(base, specs):
    """Its codes whole along fsdp where they are used, along the axes of the mesh in scope."""
    return sharding.gathered(base, sharding.replicated(specs, "fsdp"))


def gathered_on(base, specs):
    """The same by NamedShardings."""
    places = jax.tree.map(lambda s: NamedSharding(AUTO, s), specs)
    return sharding.gathered(base, sharding.replicated(places, "fsdp"))


def as_it_is(base, specs):
    return base


def gathered_bytes(hlo):
    """Bytes of all arrays that are gathered in a run."""
    return sum(c.size * c.count for c in collectives(hlo) if c.kind == "all-gather")


@all_and_few("form", "plain", "scan+remat")
def test_a_step(scheme, form):
    """Brought whole to where they are used, codes move rather than values, here of 64 bits."""
    model = layer if form == "plain" else scanned(jax.checkpoint(layer))
    values, codes = (
        gathered_bytes(check(model, scheme, form != "plain", brought=f))
        for f in (as_it_is, gathered)
    )
    # XLA's CPU compiler moves FP8 in 16 bits.
    assert codes <= (0.35 if isinstance(scheme, FP8) else 0.25) * values


@pytest.mark.slow
@FEW
def test_a_scan(scheme):
    check(scanned(layer), scheme, True, brought=gathered_on)


@FEW
@pytest.mark.parametrize(
    ("brought", "named"),
    [pytest.param(as_it_is, True, marks=pytest.mark.slow), (gathered, False)],
)
def test_the_models_own_constraint(scheme, brought, named):
    def constrained(w, x):
        for name, spec in {"up": P(None, "tensor"), "down": P("tensor")}.items():
            place = NamedSharding(AUTO, spec) if named else spec
            w = {**w, name: lax.with_sharding_constraint(w[name], place)}
        return layer(w, x)

    if named:
        check(constrained, scheme, brought=brought)
    else:
        check(scanned(constrained), scheme, True, brought=brought)


# ------------------------------------------------------------------------ explicit axes, shard_map


def resharded(w, x):
    """Weights are gathered along fsdp before the product."""
    h = jnp.tanh(x @ reshard(w["up"], P(None, "tensor")))
    down = reshard(w["down"], P("tensor", None))
    return x + jnp.einsum("bf,fd->bd", h, down, out_sharding=P("fsdp", None))


@schemes
@pytest.mark.parametrize("form", [pytest.param("plain", marks=pytest.mark.slow), "scan+remat"])
def test_explicit_axes(scheme, form):
    forms = {"plain": lambda f: f, "scan+remat": lambda f: scanned(jax.checkpoint(f))}
    check(forms[form](resharded), scheme, form != "plain", EXPLICIT)


def by_hand(checked, stacked=False):
    """Each device gathers its shards along fsdp and adds up what the others have of the outputs."""
    gather = functools.partial(lax.all_gather, axis_name="fsdp", tiled=True)

    def one(w, x):
        h = jnp.tanh(x @ gather(w["up"], axis=0))
        return x + lax.psum(h @ gather(w["down"], axis=1), "tensor")

    return lambda p, x: jax.shard_map(
        scanned(one) if stacked else one,
        mesh=AUTO,
        in_specs=(STACKED if stacked else SPECS, P("fsdp")),
        out_specs=P("fsdp"),
        check_vma=checked,
    )(p, x)


@all_and_few("checked", True, False)
def test_the_models_own_shard_map(scheme, checked):
    check(by_hand(checked), scheme)


@FEW
@pytest.mark.parametrize(
    ("checked", "brought"),
    [(True, gathered), pytest.param(False, as_it_is, marks=pytest.mark.slow)],
)
def test_a_scan_in_the_models_own_shard_map(scheme, checked, brought):
    check(by_hand(checked, True), scheme, True, brought=brought)


# ------------------------------------------------------------------------- where leaves come to lie


@all_and_few("stacked", False, True)
def test_quantized_where_it_lies(scheme, stacked):
    """Of arrays on the mesh, and in a program with `out_shardings`: there, and the same codes."""
    lead = (LAYERS,) if stacked else ()
    specs = STACKED if stacked else SPECS
    params = {"up": normal(0, *lead, D, F), "down": normal(1, *lead, F, D)}
    expected = jlora.quantize(params, scheme)
    dense = {name: NamedSharding(AUTO, spec) for name, spec in specs.items()}
    params = jax.device_put(params, dense)
    places = sharding.specs(dense, expected)
    eager = jlora.quantize(params, scheme)
    jitted = jax.jit(lambda p: jlora.quantize(p, scheme), out_shardings=places)(params)
    for base in (eager, jitted):
        assert lies_as(base, places)
        for name in specs:
            x, y = base[name], expected[name]
            laws.assert_same_codes(x, y)


@pytest.mark.parametrize(
    "scheme",
    [Int4("up|down", group=128), pytest.param(FP8("up|down"), marks=pytest.mark.slow)],
    ids=str,
)
def test_shards_that_are_no_blocks(scheme):
    """Codes whole on each device: of a part of a block there are no codes."""
    _, base, adapter, x, _ = problem(scheme)
    for checked in (True, False):
        ours = jlora.transform(by_hand(checked), jlora.LoRA(rank=2))
        laws.assert_close(step(ours)(adapter, base, x), on_one(scheme), 1e-5)


@FEW
@pytest.mark.parametrize("jitted", [True, False])
def test_merging(scheme, jitted):
    """Merged weights lie as their codes do, those that are quantized again as they did before."""
    _, base, adapter, x, specs = problem(scheme)
    adapter = {"up": adapter["up"]}
    expected = jlora.merge(base, adapter)
    base, adapter, _ = on_mesh(AUTO, base, adapter, x, specs)
    f = jax.jit(jlora.merge) if jitted else jlora.merge
    merged = f(base, adapter)
    laws.assert_close(merged, expected, 1e-6)
    assert lies_as(merged, {name: base[name].data.sharding for name in merged})


@FEW
def test_quantized_again(scheme):
    """As before, and what is not adapted is what it was."""
    _, base, adapter, x, specs = problem(scheme)
    adapter = {"up": adapter["up"]}
    expected = jlora.dequantize(jlora.merge(base, adapter, requantize=True))
    base, adapter, _ = on_mesh(AUTO, base, adapter, x, specs)
    again = jlora.merge(base, adapter, requantize=True)
    assert again["down"] is base["down"]
    assert lies_as(again, jax.tree.map(lambda v: v.sharding, base))
    laws.assert_close(jlora.dequantize(again), expected, 1e-6)


@FEW
def test_dequantized_where_it_lies(scheme):
    _, base, adapter, x, specs = problem(scheme)
    there = on_mesh(AUTO, base, adapter, x, specs)[0]
    plain = jlora.dequantize(there)
    laws.assert_close(plain, jlora.dequantize(base), 1e-6)
    assert lies_as(plain, {name: NamedSharding(AUTO, spec) for name, spec in specs.items()})


def test_loaded_where_it_is_to_lie(tmp_path):
    """A quantized checkpoint is sharded as the shapes say."""
    names = (peft.Name(r"(\w+)", r"\1", "io"),)
    files = {name: base_files.gptq(seed=i) for i, name in enumerate(SPECS)}
    folder, shape = tmp_path / "base", (base_files.COLUMNS, base_files.ROWS)
    tensors = {f"{name}.{key}": x for name, file in files.items() for key, x in file.items()}
    base_files.write(folder, files)
    save_file(tensors, folder / "model.safetensors")
    like = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(AUTO, spec))
        for name, spec in SPECS.items()
    }
    loaded = peft.load_base(folder, names, like=like)
    assert all(isinstance(x, jlora.Quantized) for x in loaded.values())
    assert lies_as(loaded, sharding.specs(jax.tree.map(lambda x: x.sharding, like), loaded))
    expected = {name: file.matrix.T for name, file in files.items()}
    laws.assert_close(jlora.dequantize(loaded), expected, 1e-6)


@FEW
def test_init(scheme):
    """The adapter of a base on the mesh, eagerly and where `out_shardings` says."""
    lora, base, adapter, x, specs = problem(scheme)
    base, key = on_mesh(AUTO, base, adapter, x, specs)[0], jax.random.key(0)
    expected = lora.init(key, jlora.dequantize(base), x)[1]
    same, found = lora.init(key, base, x)
    assert all(same[name] is base[name] for name in base)
    laws.assert_close(found, expected, 1e-6)
    places = sharding.specs(specs, adapter, AUTO)
    made = jax.jit(lambda base: lora.init(key, base, x)[1], out_shardings=places)(base)
    laws.assert_close(made, expected, 1e-6)
    assert lies_as(made, places)


@FEW
@pytest.mark.parametrize("compile", [True, False])
def test_a_plan(scheme, compile):
    """The base's bytes are those of codes and scales on a device."""
    lora, base, adapter, x, specs = problem(scheme)
    base, adapter, x = on_mesh(AUTO, base, adapter, x, specs)
    loss = lambda adapter, base, x: lora.apply(base, adapter, x).var()  # noqa: E731
    found = jlora.plan(loss, base, adapter, (x,), compile=compile)
    assert (found.peak is not None) == compile
    assert found.base == sum(v.addressable_shards[0].data.nbytes for v in jax.tree.leaves(base))
    bits = {"NF4": 4.127, "Int8": 8.2, "Int4": 4.75}[type(scheme).__name__]
    assert found.base == pytest.approx(bits * 2 * D * F / 8 / AUTO.size, rel=0.06)
