"""Operations and bytes of a layer's step, as XLA counts them for a TPU that is not there.

Forward and backward of Llama's layer in bfloat16, with the gradients of what is trained and of the
layer's input, as a layer within a model has them. The floor is the step in which the weights are
frozen and the norms trained. "Plain" is x·W + s·(x·A)·B as one would write it by hand,
differentiated by JAX.

"At least" is what the small products read and compute, as if all else were part of the products
with W.

The counts are the same on every machine; they are no times. The body of a scan counts once, of a
loop that unpacks experts only where bytes "moved" are not meant. XLA's bytes are those that its
operations access, in any memory; those "moved" are to and from main memory, and so are what a TPU's
bandwidth bounds.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jlora
from jlora import many
from jlora._planning._mesh import has_compiler, mesh_of
from jlora._progress import progress
from jlora.many._route import FORMS

from . import report, traffic

SCALE = 2.0
ATTENTION = functools.partial(jax.nn.dot_product_attention, is_causal=True)
WEIGHTS = {  # of a matrix, along the axes of the mesh
    **dict.fromkeys(("q", "k", "v", "gate", "up"), PartitionSpec("fsdp", "tensor")),
    **dict.fromkeys(("o", "down"), PartitionSpec("tensor", "fsdp")),
}


class Layer(NamedTuple):
    """A layer, what comes in, and where it is compiled for.

    Attributes:
        dim: d.
        hidden: d of the perceptron.
        heads: heads of queries; each has dim / heads.
        groups: heads of keys and values.
        batch: rows.
        length: tokens of a row.
        experts: matrices of the perceptron, each for as many tokens as it gets; 0 for one for all.
        layers: layers in a scan; 0 for one that is not scanned.
        remat: whether a layer is computed again in the backward pass.
        mesh: devices along fsdp and tensor.
        policy: what is kept nevertheless where a layer is computed again.
        attention: of queries, keys and values.
        split: whether weights of attention are reshaped to have heads, rather than their products.
    """

    dim: int
    hidden: int
    heads: int
    groups: int
    batch: int
    length: int
    experts: int = 0
    layers: int = 0
    remat: bool = False
    mesh: tuple[int, int] = (1, 1)
    policy: Callable[..., bool] | None = None
    attention: Callable[..., jax.Array] = ATTENTION
    split: bool = False

    def weights(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters of one layer."""
        d, f, kv = self.dim, self.hidden, self.dim // self.heads * self.groups
        e = (self.experts,) if self.experts else ()
        attention = {"norm1": (d,), "q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d)}
        perceptron = {"norm2": (d,), "gate": (*e, d, f), "up": (*e, d, f), "down": (*e, f, d)}
        return attention | perceptron


def flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The causal attention of Pallas, of arrays of tokens, then heads."""
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    return flash_attention(q, k, v, causal=True, sm_scale=scale).transpose(0, 2, 1, 3)


LLAMA = Layer(dim=4096, hidden=11008, heads=32, groups=32, batch=2, length=2048)
SHAPES = {
    "Llama 7B": LLAMA,
    "grouped queries": LLAMA._replace(hidden=14336, groups=8),
    "long": LLAMA._replace(hidden=14336, groups=8, batch=1, length=8192),
    "experts": LLAMA._replace(hidden=3584, groups=8, experts=8),
    "scan": LLAMA._replace(layers=4),
    "scan+remat": LLAMA._replace(layers=4, remat=True),
    "4 × 2": LLAMA._replace(batch=8, mesh=(4, 2)),
}
SMALL = Layer(dim=1024, hidden=2816, heads=8, groups=8, batch=2, length=512)


class Cost(NamedTuple):
    """What XLA says of a program on one device.

    Attributes:
        flops: floating-point operations.
        size: bytes that its operations access.
        moved: those of them that go to and from main memory.
    """

    flops: float
    size: float
    moved: int


def at_least(shape: Layer, rank: int, floor: Cost) -> Cost:
    """The floor's cost and the least that adapters of all matrices add to it.

    Of T tokens, h = x·A and Ā = xᵀ·h̄ read x, which matrices with one input share, and h̄ = ȳ·Bᵀ and
    B̄ = hᵀ·ȳ read ȳ. The sums with h·B and h̄·Aᵀ are part of the products with W, and factors and h
    are small. A layer that is computed again has x·A once more.
    """
    tokens, weights = shape.batch * shape.length, shape.weights()
    d, again = shape.dim, shape.layers > 0 and shape.remat
    inputs = 3 * d + shape.hidden  # of q, k, v; of o; of gate, up; of down
    pairs = [w[-2:] for name, w in weights.items() if "norm" not in name]
    outputs = sum(n for _, n in pairs)
    size = 2 * tokens * ((2 + again) * inputs + 2 * outputs)
    products = sum((3 + again) * (m + n) for m, n in pairs)
    flops = 2 * tokens * rank * products
    return Cost(floor.flops + flops, floor.size + size, floor.moved + size)


def run(quick: bool) -> None:
    """A row for each shape, chip and choice of what is trained."""
    if not has_compiler():
        raise SystemExit('The compiler for TPUs is missing: pip install -e ".[tpu]".')
    work = [(name, shape, "v5e", (8, 16, 64)) for name, shape in SHAPES.items()]
    work += [("Llama 7B", LLAMA, chip, (16,)) for chip in ("v5p", "v6e")]
    work = [("small", SMALL, "v5e", (8, 16))] if quick else work
    rows = []
    for name, shape, chip, ranks in progress(work, "tpu"):
        rows += measure(name, shape, chip, ranks)
    report.table("tpu: operations and bytes over the frozen step's", rows)
    report.table("routes: forward of 64 rows over that with one adapter", routes(quick))
    report.table("tables: bytes of a device, planned", tables(quick))


def measure(name: str, shape: Layer, chip: str, ranks: tuple[int, ...]) -> list[dict[str, Any]]:
    """The rows of one layer; the first is the floor."""
    programs = {"floor": step(shape, chip, "floor"), "full": step(shape, chip, "full")}
    programs["q, v r=8"] = step(shape, chip, "jlora", 8, r"[qv]")
    if shape.mesh == (1, 1):
        programs["all-linear, at least"] = at_least(shape, ranks[-1], programs["floor"])
    for rank in ranks:
        programs[f"plain r={rank}"] = step(shape, chip, "plain", rank)
        programs[f"all-linear r={rank}"] = step(shape, chip, "jlora", rank, r"w/(?!norm).*")
    for scheme in (jlora.NF4("^(?!norm).*"), jlora.Int8("^(?!norm).*")):
        label = f"all-linear r={ranks[0]}, {type(scheme).__name__}"
        programs[label] = step(shape, chip, "jlora", ranks[0], r"w/(?!norm).*", scheme)
    floor = programs["floor"]
    return [
        {
            "layer": name,
            "chip": chip,
            "trained": trained,
            "GB": cost.size / 1e9,
            "GB moved": cost.moved / 1e9,
            "bytes": cost.size / floor.size,
            "moved": cost.moved / floor.moved,
            "FLOPs": cost.flops / floor.flops,
        }
        for trained, cost in programs.items()
    ]


def routes(quick: bool) -> list[dict[str, Any]]:
    """A table of all-linear adapters of rank 16, by how rows come to theirs; no gradients."""
    layer = SMALL if quick else LLAMA
    cases = [(1, 0), (64, 0)] if quick else [(1, 0), (64, 0), (1, 4)]
    rows = []
    for length, layers in progress(cases, "routes"):
        shape = layer._replace(batch=64, length=length, layers=layers)
        one = routed(shape, 1, None)
        for slots in (8, 64):
            for form, prepared in itertools.product(FORMS, (False, True)):
                cost = routed(shape, slots, form, prepared)
                rows.append(
                    {
                        "tokens a row": length,
                        "scanned": layers,
                        "adapters": slots,
                        "form": form,
                        "prepared": prepared,
                        "FLOPs": cost.flops / one.flops,
                        "bytes": cost.size / one.size,
                        "moved": cost.moved / one.moved,
                    }
                )
    return rows


def routed(shape: Layer, slots: int, form: str | None, prepared: bool = False) -> Cost:
    """A forward pass of rows with `slots` adapters, or of one for all without a form."""
    mesh = mesh_for("v5e:2x2", (1, 1))
    w = {k: spec(mesh, s, PartitionSpec()) for k, s in _stacked(shape).items()}
    x = spec(mesh, (shape.batch, shape.length, shape.dim), PartitionSpec())
    lora, adapter = _adapted(shape, 16, w, x)
    if form is None:
        return _cost(jax.jit(lora.apply).lower({"w": w}, adapter, x).compile())
    table = jax.tree.map(lambda v: spec(mesh, (slots, *v.shape), PartitionSpec()), adapter)
    ids = jax.ShapeDtypeStruct((shape.batch,), jnp.int32, sharding=x.sharding)
    if prepared:
        table = jax.eval_shape(many.prepare, table)
        table = jax.tree.map(lambda v: spec(mesh, v.shape, PartitionSpec()), table)
    f = many.route(lora.apply, form=form)
    return _cost(jax.jit(f).lower({"w": w}, table, ids, x).compile())


def tables(quick: bool) -> list[dict[str, Any]]:
    """What a device of eight holds of a base of 7B and a table of adapters of rank 16, q and v."""
    shape = (SMALL if quick else LLAMA)._replace(layers=32, batch=64, length=1)
    mesh = mesh_for("v5e:2x4", (4, 2))
    w = {k: spec(mesh, s, _partition(k, s, shape)) for k, s in _stacked(shape).items()}
    x = spec(mesh, (shape.batch, shape.length, shape.dim), PartitionSpec("fsdp"))
    ids = jax.ShapeDtypeStruct((shape.batch,), jnp.int32, sharding=x.sharding)
    lora, adapter = _adapted(shape, 16, w, x, r"[qv]")

    def loss(table: Any, base: Any, x: jax.Array, ids: jax.Array) -> jax.Array:
        return many.route(lora.apply)(base, table, ids, x).astype(jnp.float32).sum()

    rows = []
    for slots in (1, 100, 1000):
        table = jax.tree.map(
            lambda v, n=slots: spec(mesh, (n, *v.shape), PartitionSpec(None, *v.sharding.spec)),
            adapter,
        )
        found = jlora.plan(loss, {"w": w}, table, (x, ids), optax.set_to_zero(), compile=False)
        sizes = {"base GB": found.base / 1e9, "table GB": found.adapter / 1e9}
        rows.append({"adapters": slots, **sizes, "devices": found.devices})
    return rows


def _adapted(
    shape: Layer, rank: int, w: Any, x: Any, pattern: str = r"w/(?!norm).*"
) -> tuple[jlora.types.Transformed, Any]:
    """The transform, and the shapes of its adapter where they lie as the base does."""
    lora = jlora.transform(
        functools.partial(model, shape=shape),
        jlora.LoRA(pattern, rank=rank, alpha=SCALE * rank, dtype=jnp.bfloat16),
    )
    _, adapter = jax.eval_shape(lora.init, jax.random.key(0), {"w": w}, x)
    specs = jlora.sharding.specs({"w": jax.tree.map(lambda v: v.sharding, w)}, adapter)
    mesh = x.sharding.mesh
    return lora, jax.tree.map(lambda v, s: spec(mesh, v.shape, s.spec), adapter, specs)


def step(shape: Layer, chip: str, *trained: Any, options: Any = None) -> Cost:
    """The cost on a chip of what `compile_step` compiles."""
    devices = shape.mesh[0] * shape.mesh[1]
    slices = {1: "2x2x1" if chip == "v5p" else "2x2", 8: "2x2x2" if chip == "v5p" else "2x4"}
    mesh = mesh_for(f"{chip}:{slices[devices]}", shape.mesh)
    runs = 1 if shape.layers else max(shape.experts, 1)  # of the loop that unpacks experts
    return _cost(compile_step(shape, mesh, *trained, options=options), runs)


def compile_step(
    shape: Layer,
    mesh: Mesh,
    trained: str,
    rank: int = 0,
    pattern: str = "",
    scheme: Any = None,
    options: dict[str, Any] | None = None,
) -> jax.stages.Compiled:
    """A step of `shape` in which `trained` is: "floor", "full", "plain" or "jlora".

    With a `scheme` the frozen weights are quantized, and gathered along fsdp as codes. `options`
    are the compiler's.
    """
    compiled = functools.partial(_compiled, options=options)
    w = {k: spec(mesh, s, _partition(k, s, shape)) for k, s in _stacked(shape).items()}
    rows = PartitionSpec("fsdp") if mesh.size > 1 else PartitionSpec()
    x = spec(mesh, (shape.batch, shape.length, shape.dim), rows)
    norms = {k: v for k, v in w.items() if "norm" in k}
    if trained in ("floor", "full"):
        first = norms if trained == "floor" else w
        rest = {k: v for k, v in w.items() if k not in first}
        return compiled(lambda t, f, x: model({"w": {**f, **t}}, x, shape), first, rest, x)
    lora, adapter = _adapted(shape, rank, w, x, pattern or r"w/(?!norm).*")
    if scheme is not None:
        places = jax.tree.map(lambda v: v.sharding, w)
        w = jlora.quantize(w, scheme)
        specs = jlora.sharding.specs(places, w)
        w = jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), w, specs)
        w = jlora.sharding.gathered(w, jlora.sharding.replicated(places, "fsdp"))
    if trained == "jlora":
        return compiled(lambda a, w, x: lora.apply({"w": w}, a, x), adapter, w, x)
    factors = {k: (node.a, node.b) for k, node in adapter["w"].items()}
    return compiled(lambda ab, w, x: model({"w": w, "ab": ab}, x, shape), factors, w, x)


def _compiled(
    f: Callable[..., jax.Array], trained: Any, frozen: Any, x: Any, options: Any
) -> jax.stages.Compiled:
    def both(trained: Any, frozen: Any, x: Any, g: Any) -> Any:
        y, back = jax.vjp(lambda trained, x: f(trained, frozen, x), trained, x)
        return y, back(g)

    return jax.jit(both).lower(trained, frozen, x, x).compile(options)


def _cost(program: jax.stages.Compiled, runs: int = 1) -> Cost:
    cost: Any = program.cost_analysis()
    return Cost(cost["flops"], cost["bytes accessed"], traffic.main_memory(program.as_text(), runs))


@functools.cache
def mesh_for(topology: str, axes: tuple[int, int]) -> Mesh:
    """A mesh along fsdp and tensor of devices that are not there, such as "v5e:2x4"."""
    if axes != (1, 1):
        return mesh_of(topology, dict(zip(("fsdp", "tensor"), axes, strict=True)))
    devices = mesh_of(topology, {"x": 4}).devices
    return Mesh(devices[:1].reshape(1, 1), ("fsdp", "tensor"))


def spec(mesh: Mesh, shape: tuple[int, ...], partition: PartitionSpec) -> jax.ShapeDtypeStruct:
    """A bfloat16 array of a shape and where it lies."""
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, partition))


def _stacked(shape: Layer) -> dict[str, tuple[int, ...]]:
    stack = (shape.layers,) if shape.layers else ()
    return {k: (*stack, *s) for k, s in shape.weights().items()}


def _partition(name: str, weight: tuple[int, ...], shape: Layer) -> PartitionSpec:
    spec = WEIGHTS.get(name, PartitionSpec())
    return PartitionSpec(*(None,) * (len(weight) - len(spec) if spec else 0), *spec)


# ------------------------------------------------------------------------------------ the layer


def model(params: dict[str, Any], x: jax.Array, shape: Layer) -> jax.Array:
    """One layer, or a scan over several; `params` has the weights, and "ab" for the plain form."""
    if not shape.layers:
        return _layer(params, x, shape)

    def body(x: jax.Array, params: dict[str, Any]) -> tuple[jax.Array, None]:
        return _layer(params, x, shape), None

    if shape.remat:
        body = jax.checkpoint(body, prevent_cse=False, policy=shape.policy)
    return jax.lax.scan(body, x, params)[0]


def _layer(params: dict[str, Any], x: jax.Array, shape: Layer) -> jax.Array:
    w, rows = params["w"], x.shape[:2]
    dense = functools.partial(_dense, params, shape)
    h = norm(x, w["norm1"])
    q, k, v = (dense(name, h).reshape(*rows, -1, shape.dim // shape.heads) for name in "qkv")
    y = shape.attention(q, k, v)
    x = x + dense("o", y if shape.split else y.reshape(x.shape))
    h = norm(x, w["norm2"])
    return x + dense("down", jax.nn.silu(dense("gate", h)) * dense("up", h))


def norm(x: jax.Array, g: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5)
    return y.astype(x.dtype) * g


def _dense(params: dict[str, Any], shape: Layer, name: str, x: jax.Array) -> jax.Array:
    w = params["w"][name]
    flat = _by_expert(shape, x) if w.ndim == 3 else jnp.matmul
    first = _from_heads if x.ndim == 4 else flat
    last = functools.partial(_to_heads, shape) if shape.split and name in "qkv" else flat
    y = (last if first is flat else first)(x, w)
    if "ab" not in params:
        return y
    a, b = params["ab"][name]
    return y + SCALE * last(first(x, a), b)


def _to_heads(shape: Layer, x: jax.Array, w: jax.Array) -> jax.Array:
    """The product of each token with a matrix, as heads."""
    w = w.reshape(len(w), -1, shape.dim // shape.heads)
    return jnp.einsum("bli,ihk->blhk", x, w)


def _from_heads(x: jax.Array, w: jax.Array) -> jax.Array:
    """The product of each token with a matrix; of its heads as one vector."""
    return jnp.einsum("blhk,hko->blo", x, w.reshape(*x.shape[2:], -1))


def _by_expert(shape: Layer, x: jax.Array) -> Callable[..., jax.Array]:
    """The product of each token with the matrix of its expert; each expert has as many tokens."""
    tokens = x.shape[0] * x.shape[1]
    sizes = jnp.full(shape.experts, tokens // shape.experts)

    def dot(x: jax.Array, w: jax.Array) -> jax.Array:
        y = jax.lax.ragged_dot(x.reshape(tokens, -1), w, sizes)
        return y.reshape(*x.shape[:-1], -1)

    return dot
