"""Models for the tests of sharding: how each base lies on fsdp × tensor, and how its adapter must.

Sizes are such that every axis that is divided is so on 4 × 2 devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import meshes
from flax import nnx
from jax.sharding import PartitionSpec as P

import jlora
from jlora import Full, LoRA, Slots

LAYERS, D, HEADS, WIDTH, F, VOCAB, BATCH, LENGTH = 3, 16, 4, 4, 32, 24, 8, 5
MESH = {"fsdp": 4, "tensor": 2}
RULES = (("vocab", "tensor"), ("embed", "fsdp"), ("heads", "tensor"), ("mlp", "tensor"))


class Model(NamedTuple):
    """A model and one call of it.

    Attributes:
        apply: `apply(params, *args)`.
        params: arrays on one device.
        args: activations first; their leading axis is the batch, divided over fsdp.
        rules: jlora's.
        base: a tree of PartitionSpec with the paths of `params`.
        expected: for each path of the adapter the specs of A and B, or of the leaf in full.
    """

    apply: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    rules: tuple[Any, ...]
    base: Any
    expected: dict[str, Any]


def normal(seed: int, *shape: int) -> jax.Array:
    """Normals of a variance that keeps deep models tame."""
    return 0.3 * meshes.normal(seed, *shape)


IDS = jax.random.randint(jax.random.key(9), (BATCH, LENGTH), 0, VOCAB)
X = normal(8, BATCH, D)

# ---------------------------------------------------------------------------------------- plain


def lists() -> Model:
    """A list of dicts; short specs, none at all, one axis over two mesh axes."""

    def apply(params: Any, x: jax.Array) -> jax.Array:
        for layer in params["layers"]:
            x = x + jnp.tanh(x @ layer["up"] + layer["bias"]) @ layer["down"]
        return x @ params["head"]

    def layer(i: int) -> dict[str, jax.Array]:
        return {"up": normal(i, D, F), "down": normal(i + 1, F, D), "bias": normal(i + 2, F)}

    places = {"up": P(("fsdp", "tensor")), "down": P("tensor", "fsdp"), "bias": P("tensor")}
    up, down = (P(("fsdp", "tensor"), None), P(None, None)), (P("tensor", None), P(None, "fsdp"))
    each = {"up": up, "down": down, "bias": P("tensor")}
    return Model(
        apply,
        {"layers": [layer(0), layer(3)], "head": normal(7, D, 6)},
        (X,),
        (LoRA("up|down|head", rank=2), Full("bias")),
        {"layers": [places, places], "head": None},
        {f"layers/{i}/{name}": spec for i in range(2) for name, spec in each.items()}
        | {"head": (P(None, None), P(None, None))},
    )


def scanned() -> Model:
    """Layers in one array each, with several axes of heads."""

    def apply(params: Any, x: jax.Array) -> jax.Array:
        def body(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
            h = jnp.tanh(jnp.einsum("bd,dhk->bhk", x, w["q"]))
            return x + jnp.einsum("bhk,hkd->bd", h, w["o"]), None

        return jax.lax.scan(jax.checkpoint(body), x, params)[0]

    q, o = normal(0, LAYERS, D, HEADS, WIDTH), normal(1, LAYERS, HEADS, WIDTH, D)
    return Model(
        apply,
        {"q": q, "o": o},
        (X,),
        (LoRA(rank=2),),
        {"q": P(None, "fsdp", "tensor"), "o": P(None, "tensor", None, "fsdp")},
        {
            "q": (P(None, "fsdp", None), P(None, None, "tensor", None)),
            "o": (P(None, "tensor", None, None), P(None, None, "fsdp")),
        },
    )


def experts() -> Model:
    """A matrix for each expert, the experts divided."""

    def apply(params: Any, x: jax.Array) -> jax.Array:
        gates = jax.nn.softmax(x @ params["router"])
        h = jnp.einsum("be,bd->ebd", gates, x)
        h = jnp.tanh(jnp.einsum("ebd,edf->ebf", h, params["up"]))
        return jnp.einsum("ebf,efd->ebd", h, params["down"]).sum(0)

    return Model(
        apply,
        {"up": normal(0, 4, D, F), "down": normal(1, 4, F, D), "router": normal(2, D, 4)},
        (X,),
        (LoRA("up|down", rank=2),),
        {"up": P("fsdp", None, "tensor"), "down": P("fsdp", "tensor"), "router": P()},
        {
            "up": (P("fsdp", None, None), P("fsdp", None, "tensor")),
            "down": (P("fsdp", "tensor", None), P("fsdp", None, None)),
        },
    )


def experts_that_share() -> Model:
    """One A for the experts of `up`, one B for those of `down`."""
    return experts()._replace(
        rules=(LoRA("up", rank=2, share="inputs"), LoRA("down", rank=2, share="outputs")),
        expected={
            "up": (P(None, None), P(None, "fsdp", "tensor")),
            "down": (P("fsdp", "tensor", None), P(None, None)),
        },
    )


# ----------------------------------------------------------------------------------------- Flax


class Block(nn.Module):
    """Heads and an MLP; every axis has a logical name."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """One layer of a scan."""

        def dense(features: Any, name: str, *axes: str, of: Any = -1) -> nn.Module:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.3), axes)
            return nn.DenseGeneral(features, axis=of, kernel_init=init, name=name)

        h = jnp.tanh(dense((HEADS, WIDTH), "query", "embed", "heads", "kv")(x))
        x = x + dense(D, "out", "heads", "kv", "embed", of=(-2, -1))(h)
        h = nn.gelu(dense(F, "up", "embed", "mlp")(x))
        return x + jnp.tanh(dense(D, "down", "mlp", "embed")(h)), None


class Decoder(nn.Module):
    """Scanned blocks between an embedding and itself."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Logits."""
        init = nn.with_logical_partitioning(nn.initializers.normal(0.3), ("vocab", "embed"))
        embed = nn.Embed(VOCAB, D, embedding_init=init, name="embed")
        names = {nn.meta.PARTITION_NAME: "layers"}
        how = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": LAYERS}
        blocks = nn.scan(Block, **how, metadata_params=names)
        return embed.attend(blocks(name="blocks")(embed(ids), None)[0])


def boxed() -> Any:
    """The variables of `Decoder` in Flax's boxes with logical names."""
    return Decoder().init(jax.random.key(0), IDS)


def linen() -> Model:
    """Scanned linen, its logical axes put on the mesh by Flax; the table is divided by rows."""
    variables = boxed()
    mesh = jax.sharding.AbstractMesh(tuple(MESH.values()), tuple(MESH))
    logical = nn.get_partition_spec(variables)
    found = nn.logical_to_mesh_sharding(logical, mesh, RULES)
    root, heads = "params/blocks", P(None, None, "tensor", None)
    return Model(
        Decoder().apply,
        jax.tree.map(lambda w: w.astype(float), nn.meta.unbox(variables)),
        (IDS,),
        (LoRA("kernel|embedding", rank=2), Full("up/bias")),
        jax.tree.map(lambda s: s.spec, found),
        {
            "params/embed/embedding": (P("tensor", None), P(None, "fsdp")),
            f"{root}/query/kernel": (P(None, "fsdp", None), heads),
            f"{root}/out/kernel": (P(None, "tensor", None, None), P(None, None, "fsdp")),
            f"{root}/up/kernel": (P(None, "fsdp", None), P(None, None, "tensor")),
            f"{root}/down/kernel": (P(None, "tensor", None), P(None, None, "fsdp")),
            f"{root}/up/bias": P(),
        },
    )


class MLP(nnx.Module):
    """Two layers whose kernels say where they lie."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Two kernels."""
        init = nnx.initializers.normal(0.3)
        up = nnx.with_partitioning(init, ("fsdp", "tensor"))
        down = nnx.with_partitioning(init, ("tensor", "fsdp"))
        first = nnx.Linear(D, F, kernel_init=up, rngs=rngs)
        self.layers = nnx.List([first, nnx.Linear(F, D, kernel_init=down, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Of the shape of `x`."""
        return self.layers[1](jnp.tanh(self.layers[0](x)))


def nnx_split() -> tuple[Any, Any]:
    """Graph and state of `MLP` on one device; the state has the metadata."""
    with nnx.use_eager_sharding(False):
        return nnx.split(MLP(nnx.Rngs(0)))


def nnx_model() -> Model:
    """NNX through split and merge."""
    graph, state = nnx_split()

    def apply(state: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, state, copy=True)(x)

    return Model(
        apply,
        state,
        (X,),
        (LoRA("kernel", rank=2), Full("0/bias")),
        nnx.get_partition_spec(state),
        {
            "layers/0/kernel": (P("fsdp", None), P(None, "tensor")),
            "layers/1/kernel": (P("tensor", None), P(None, "fsdp")),
            "layers/0/bias": P(),
        },
    )


def fused() -> Model:
    """The q and v of a fused kernel that is stored outputs first, as GPT-2's, and a tied table."""

    def apply(params: Any, ids: jax.Array) -> jax.Array:
        x = params["table"][ids]
        q, k, v = jnp.split(x @ params["qkv"].T, 3, axis=-1)
        return (x + jnp.tanh(q) * k + v) @ params["table"].T

    return Model(
        apply,
        {"qkv": normal(0, 3 * D, D), "table": normal(1, VOCAB, D)},
        (IDS,),
        (LoRA("qkv", rank=2, slots=Slots(3, (0, 2))), LoRA("table", rank=2)),
        {"qkv": P("tensor", "fsdp"), "table": P("tensor", "fsdp")},
        {
            "qkv": (P(None, "fsdp", None), P(None, None, "tensor")),
            "table": (P("tensor", None), P(None, "fsdp")),
        },
    )


MODELS = {
    "lists": lists,
    "scanned": scanned,
    "experts": experts,
    "experts that share": experts_that_share,
    "linen": linen,
    "nnx": nnx_model,
    "fused": fused,
}


def adapter_of(model: Model, *, abstract: bool = False) -> Any:
    """An adapter of `model` with B not zero, or its shapes."""
    lora = jlora.transform(model.apply, *model.rules)
    shapes = jax.eval_shape(lora.init, jax.random.key(0), model.params, *model.args)[1]
    if abstract:
        return shapes
    return jax.tree.map(lambda s: normal(s.size, *s.shape), shapes)
