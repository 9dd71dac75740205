"""Quantized bases on a mesh of eight devices, in float64.

Whatever the mesh, a step gives what it gives on one device on the weights that the codes stand for.

By hand: XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_ENABLE_X64=1 pytest -n 0 FILE
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from collectives import collectives
from jax import lax
from jax.sharding import AxisType, NamedSharding, reshard
from jax.sharding import PartitionSpec as P
from meshes import assert_lies, mesh_of, on, put
from meshes import normal as draw
from small import set_up_noisy, some, some_rows

import jlora
from jlora import FP8, NF4, Int4, Int8, peft, sharding
from tests.peft.formats import test_base_files as base_files

LAYERS, D, F, ROWS = 3, 256, 128, 8
AUTO, EXPLICIT = mesh_of(), mesh_of(AxisType.Explicit)
SPECS = {"up": P("fsdp", "tensor"), "down": P("tensor", "fsdp")}
STACKED = {name: P(None, *spec) for name, spec in SPECS.items()}
SCHEMES = [
    NF4("up|down"),
    Int8("up|down"),
    Int4("up|down", group=32),
    NF4("up|down", double=False),
    Int8("up|down", block=32),
    FP8("up|down", block=64),
    FP8("up|down", block=None),
]
FEW = SCHEMES[:3]


def each(schemes, *columns):
    """Parametrizes by scheme and by one of the values of each of `columns`.

    The first of each are for every day, the rest for the long run.
    """
    names = ["scheme", *(name for name, _ in columns)]
    rows = list(itertools.product(schemes, *(values for _, values in columns)))
    return pytest.mark.parametrize(names, some_rows(rows, rows[0]), ids=str)


def normal(seed, *shape):
    return draw(seed, *shape) / 8


def layer(w, x):
    return x + jnp.tanh(x @ w["up"]) @ w["down"]


def scanned(layer):
    return lambda p, x: lax.scan(lambda x, w: (layer(w, x), None), x, p)[0]


def params_of(stacked=False):
    """Two weights of one layer, or of several, and where they lie."""
    lead = (LAYERS,) if stacked else ()
    params = {"up": normal(0, *lead, D, F), "down": normal(1, *lead, F, D)}
    return params, STACKED if stacked else SPECS


@functools.cache
def problem(scheme, stacked=False):
    """Transform, quantized base, adapter and input on one device, and where weights lie."""
    params, specs = params_of(stacked)
    x = normal(2, ROWS, D)
    f, base = scanned(layer) if stacked else layer, jlora.quantize(params, scheme)
    return *set_up_noisy(f, jlora.LoRA(rank=2), base, x), x, specs


def on_mesh(mesh, base, adapter, x, specs):
    """All of it on a mesh, by the partitions of the dense weights."""
    base, adapter = (put(t, mesh, sharding.specs(specs, t)) for t in (base, adapter))
    return base, adapter, put(x, mesh, P("fsdp"))


def step(lora, gather=lambda base: base):
    """Outputs, and their slope along the adapter, of (adapter, base, x)."""
    return jax.jit(laws.value_and_slope(lambda a, b, x: lora.apply(gather(b), a, x)))


@functools.cache
def on_one(scheme, stacked=False):
    """What a step gives on one device on dequantized weights."""
    lora, base, adapter, x, _ = problem(scheme, stacked)
    expected = step(lora)(adapter, jlora.dequantize(base), x)
    assert np.abs(expected[0][0]).max() > 0.1
    return expected


def check(model, scheme, stacked=False, mesh=AUTO, gather=lambda base, specs: base):
    """`model` on the mesh, of layers however they are written, gives what they do on one device."""
    _, base, adapter, x, specs = problem(scheme, stacked)
    expected = on_one(scheme, stacked)
    base, adapter, x = on_mesh(mesh, base, adapter, x, specs)
    ours = jlora.transform(model, jlora.LoRA(rank=2))
    with jax.set_mesh(mesh):
        f = step(ours, lambda base: gather(base, specs)).lower(adapter, base, x).compile()
        laws.assert_close(f(adapter, base, x), expected, 1e-5)
    return f.as_text()


def codes_whole(base, specs):
    """Its codes whole along fsdp where they are used, along the axes of the mesh in scope."""
    return sharding.gathered(base, sharding.replicated(specs, "fsdp"))


def codes_whole_on(base, specs):
    """The same by NamedShardings."""
    return sharding.gathered(base, sharding.replicated(on(AUTO, specs), "fsdp"))


# -------------------------------------------------------------------------------- models on a mesh


@each(SCHEMES, ("stacked", [True, False]))
def test_codes_move_rather_than_values(scheme, stacked):
    """Brought whole to where they are used; values have 64 bits here."""
    model = scanned(jax.checkpoint(layer)) if stacked else layer
    texts = [check(model, scheme, stacked), check(model, scheme, stacked, gather=codes_whole)]
    found = ([c for c in collectives(text) if c.kind == "all-gather"] for text in texts)
    values, codes = (sum(c.size * c.count for c in gathers) for gathers in found)
    # XLA's CPU compiler moves FP8 in 16 bits.
    assert codes <= (0.35 if isinstance(scheme, FP8) else 0.25) * values


def on_host(base, specs):
    """In the memory of the host."""
    del specs
    return jax.device_put(base, jax.memory.Space.Host)


def constrained(w, x):
    """With constraints of the model's own."""
    for name, spec in {"up": P(None, "tensor"), "down": P("tensor")}.items():
        w = {**w, name: lax.with_sharding_constraint(w[name], spec)}
    return layer(w, x)


def resharded(w, x):
    """Weights are gathered along fsdp before the product."""
    h = jnp.tanh(x @ reshard(w["up"], P(None, "tensor")))
    down = reshard(w["down"], P("tensor", None))
    return x + jnp.einsum("bf,fd->bd", h, down, out_sharding=P("fsdp", None))


def offloaded(w, x):
    """Weights are moved from the memory of the host to where they are sharded."""
    places = {name: NamedSharding(AUTO, spec, memory_kind="device") for name, spec in SPECS.items()}
    return layer(jax.device_put(w, places), x)


def by_hand(checked, stacked):
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


def plain_or(wrap):
    """Of a layer, or of several in a scan."""
    return lambda f: lambda stacked: wrap(f) if stacked else f


remat = plain_or(lambda f: scanned(jax.checkpoint(f)))
MODELS = {
    "scan": (plain_or(scanned)(layer), AUTO, codes_whole_on),
    "constraint": (plain_or(scanned)(constrained), AUTO, codes_whole),
    "offloaded": (plain_or(scanned)(offloaded), AUTO, on_host),
    "explicit": (remat(resharded), EXPLICIT, lambda base, specs: base),
    "shard_map": (functools.partial(by_hand, True), AUTO, lambda base, specs: base),
    "unchecked": (functools.partial(by_hand, False), AUTO, codes_whole),
}


@pytest.mark.parametrize("name", some(MODELS, "explicit"))
@each(SCHEMES, ("stacked", [True, False]))
def test_a_step(scheme, stacked, name):
    model, mesh, gather = MODELS[name]
    check(model(stacked), scheme, stacked, mesh, gather)


@each(SCHEMES)
def test_a_shard_map_takes_codes(scheme):
    """No dense weight goes into it where shards are blocks."""
    _, base, adapter, x, specs = problem(scheme)
    ours = jlora.transform(by_hand(True, False), jlora.LoRA(rank=2))
    jaxpr = jax.make_jaxpr(ours.apply)(*on_mesh(AUTO, base, adapter, x, specs))
    [mapped] = [e for e in jaxpr.eqns if e.primitive.name == "shard_map"]
    shapes = {v.aval.shape for v in mapped.invars if v.aval.dtype == x.dtype}
    assert shapes.isdisjoint({(D, F), (F, D)})


@each([Int4("up|down", group=128), FP8("up|down")])
def test_shards_that_are_no_blocks(scheme):
    """Codes whole on each device: of a part of a block there are no codes."""
    _, base, adapter, x, _ = problem(scheme)
    ours = jlora.transform(by_hand(isinstance(scheme, FP8), False), jlora.LoRA(rank=2))
    laws.assert_close(step(ours)(adapter, base, x), on_one(scheme), 1e-5)


# ------------------------------------------------------------------------- where leaves come to lie


EXPLICIT_ONLY = [pytest.param(AUTO, marks=pytest.mark.slow), EXPLICIT]
meshes = pytest.mark.parametrize("mesh", EXPLICIT_ONLY, ids=["auto", "explicit"])


@meshes
@each(SCHEMES, ("stacked", [True, False]))
def test_quantized_where_it_lies(scheme, stacked, mesh):
    """Of arrays on the mesh, and in a program with `out_shardings`: there, and the same codes.

    Of shapes on the mesh: there, too.
    """
    params, specs = params_of(stacked)
    expected, params = jlora.quantize(params, scheme), put(params, mesh, specs)
    places = sharding.specs(on(mesh, specs), expected)
    quantize = lambda p: jlora.quantize(p, scheme)  # noqa: E731
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    assert_lies(quantize(shapes), places)
    for base in (quantize(params), jax.jit(quantize, out_shardings=places)(params)):
        assert_lies(base, places)
        laws.assert_same_codes(base, expected)


def merge_again(base, adapter):
    """Merged and quantized again; what is not adapted is what it was."""
    found = jlora.merge(base, adapter, requantize=True)
    assert found["down"] is base["down"]
    return found


# What keeps the places of codes, or has those of the dense weights.
KEEPING = {
    "merged": lambda base, adapter: jlora.merge(base, adapter),
    "jitted": lambda base, adapter: jax.jit(jlora.merge)(base, adapter),
    "requantized": merge_again,
    "dequantized": lambda base, _: jlora.dequantize(base),
}


@meshes
@pytest.mark.parametrize("name", KEEPING)
@each(FEW)
def test_kept_where_it_lies(scheme, name, mesh):
    f, (_, base, adapter, x, specs) = KEEPING[name], problem(scheme)
    adapter = {"up": adapter["up"]}
    expected = f(base, adapter)
    base, adapter, _ = on_mesh(mesh, base, adapter, x, specs)
    found = f(base, adapter)
    laws.assert_close(jlora.dequantize(found), jlora.dequantize(expected), 1e-6)
    assert_lies(found, base if name == "requantized" else on(mesh, specs))


def test_loaded_where_it_is_to_lie(tmp_path):
    """A quantized checkpoint is sharded as the shapes say, and what is in floats."""
    names = (peft.Name("norm", "norm", "o"), peft.Name(r"(\w+)", r"\1", "io"))
    files = {name: base_files.gptq(seed=i) for i, name in enumerate(SPECS)}
    folder, shape = tmp_path / "base", (base_files.COLUMNS, base_files.ROWS)
    base_files.write(folder, files)
    places = on(AUTO, SPECS | {"norm": P("fsdp")})
    shapes = dict.fromkeys(SPECS, shape) | {"norm": shape[1:]}
    like = {n: jax.ShapeDtypeStruct(s, jnp.float32, sharding=places[n]) for n, s in shapes.items()}
    loaded = peft.load_base(folder, like, names)
    assert all(isinstance(loaded[name], jlora.Quantized) for name in SPECS)
    assert_lies(loaded, sharding.specs(places, loaded))
    expected = {name: file.matrix.T for name, file in files.items()} | {"norm": np.ones(shape[1])}
    laws.assert_close(jlora.dequantize(loaded), jax.tree.map(np.float32, expected), 1e-6)


def test_blocks_that_shards_would_break(tmp_path):
    """Of a scheme and of a file: the error has the argument and the path."""
    place = on(AUTO, P("fsdp"))
    params = {"mlp": {"up": jax.device_put(normal(0, D, F), place)}}
    said = r"mlp/up: axis 0 of length 256 over fsdp=4 gives each device 64, which is not a multiple"
    with pytest.raises(ValueError, match=f"(?s)`params` has a weight.*{said}"):
        jlora.quantize(params, NF4("up", block=128))
    base_files.write(tmp_path / "base", {"mlp": base_files.gptq(group=64)})
    shape = (base_files.COLUMNS, base_files.ROWS)
    like = {"mlp": {"up": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)}}
    names = (peft.Name("mlp/up", "mlp", "io"), peft.Name("norm", "norm", "o"))
    like["norm"] = jax.ShapeDtypeStruct(shape[1:], jnp.float32)
    with pytest.raises(ValueError, match=r"(?s)`like` has a weight.*mlp/up: axis 0 of length 128"):
        peft.load_base(tmp_path / "base", like, names)


@each(FEW)
def test_init(scheme):
    """The adapter of a base on the mesh, eagerly and where `out_shardings` says."""
    lora, base, adapter, x, specs = problem(scheme)
    base, key = on_mesh(AUTO, base, adapter, x, specs)[0], jax.random.key(0)
    expected = lora.init(key, jlora.dequantize(base), x)[1]
    same, found = lora.init(key, base, x)
    assert all(same[name] is base[name] for name in base)
    places = sharding.specs(specs, adapter, AUTO)
    made = jax.jit(lambda base: lora.init(key, base, x)[1], out_shardings=places)(base)
    for start in (found, made):
        laws.assert_close(start, expected, 1e-6)
    assert_lies(made, places)


@each(FEW, ("compile", [True, False]))
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
