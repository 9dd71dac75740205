"""What the models share: layers whose axes have names, a stack of blocks, places on a mesh.

Every parameter names its axes, and activations name theirs where a partitioner needs to know. A
table of rules says which axis of a mesh each name is cut along. Without a mesh none of it acts:

    variables = nn.unbox(model.init(key, ids))

On a mesh, here of axes called ``fsdp`` and ``tensor``, a model starts in its place, whole nowhere:

    abstract = jax.eval_shape(model.init, key, ids)
    places = shardings(abstract, mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        variables = jax.jit(lambda key: nn.unbox(model.init(key, ids)), out_shardings=places)(key)
        logits = jax.jit(model.apply)(variables, ids)
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]

# The name of an axis, and the axes of the mesh that it is cut along.
RULES: Rules = (
    # Of parameters: fully sharded along their inputs or outputs of model size, gathered for use.
    ("embed", "fsdp"),
    ("layers", None),
    ("norm", None),
    ("position", None),
    # Of parameters and activations: what tensor parallelism cuts.
    ("heads", "tensor"),
    ("kv_heads", "tensor"),  # of keys and values, where queries share them
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    # Of activations.
    ("batch", "fsdp"),
    ("length", None),
    ("residual", None),  # the axis of tokens between the blocks, where norms and sums act
)
# Sequence parallelism: between the blocks, tokens are cut along the axis that cuts heads within.
SEQUENCE_RULES: Rules = tuple(
    (name, "tensor" if name == "residual" else axis) for name, axis in RULES
)


def shardings(variables: Any, mesh: jax.sharding.Mesh, rules: Rules = RULES) -> Any:
    """The `NamedSharding` of each variable, in the tree that `nn.unbox` leaves of `variables`."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(variables), mesh, rules)


def shapes(model: nn.Module) -> Any:
    """The variables of a model as `jax.ShapeDtypeStruct`s, without the names of their axes."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(lambda: nn.unbox(model.init(jax.random.key(0), ids)))


def check_length(ids: jax.Array, most: int) -> None:
    """Refuses sequences that are longer than a table of positions: reads beyond it give NaN.

    Raises:
        ValueError: ``(B, L)`` ids with L larger than `most`.
    """
    if ids.shape[1] > most:
        raise ValueError(
            f"`ids` must be (B, L) with L at most {most}, the positions of the model; got "
            f"{ids.shape}. Cut the sequences."
        )


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, whose axes have these names, where the rules put it."""
    return nn.with_logical_constraint(x, names)


class Causal(NamedTuple):
    """A causal language model with its weights, whatever library it is written in.

    Attributes:
        apply: (variables, ids, segments, positions, labels=labels) to log-probabilities.
        variables: in their places.
        places: the sharding of each.
        names: rows for PEFT's files.
        pattern: of the weights that are adapted: of all linear layers but head and experts.
        is_packed: whether a row may hold several texts that do not see each other.
        answer: (model function, prompts, stops) to the likeliest tokens after each prompt.
        compare: (ids, positions) to what differs from PyTorch; None without PyTorch's floats.
    """

    apply: Callable[..., Any]
    variables: Any
    places: Any
    names: Any
    pattern: str
    is_packed: bool
    answer: Callable[..., list[list[int]]]
    compare: Callable[..., Any] | None = None


# ---- layers -------------------------------------------------------------------------------------

_named = nn.with_logical_partitioning


def dense(size: int, axes: tuple[str | None, str | None], **options: Any) -> nn.Dense:
    """A dense layer whose kernel's axes have the names `axes`."""
    kernel = _named(nn.initializers.lecun_normal(), axes)
    bias = _named(nn.initializers.zeros, axes[1:])
    return nn.Dense(size, kernel_init=kernel, bias_init=bias, **options)


def fused(count: int, inputs: int, size: int, axes: tuple[str, str], **options: Any) -> nn.Einsum:
    """`count` dense layers in one kernel (inputs, count, size), each cut by a mesh as one is."""
    kernel = _named(nn.initializers.lecun_normal(0, (1, 2)), (axes[0], None, axes[1]))
    bias = _named(nn.initializers.zeros, (None, axes[1]))
    shape = inputs, count, size
    return nn.Einsum(shape, "bli,ico->blco", kernel_init=kernel, bias_init=bias, **options)


def conv(size: int, width: int, axes: tuple[str | None, str | None], **options: Any) -> nn.Conv:
    """A convolution over tokens, the axes of whose kernel have the names ``None, *axes``."""
    kernel = _named(nn.initializers.lecun_normal(), (None, *axes))
    bias = _named(nn.initializers.zeros, axes[1:])
    return nn.Conv(size, (width,), kernel_init=kernel, bias_init=bias, **options)


def embed(rows: int, size: int, axis: str, **options: Any) -> nn.Embed:
    """A table of `rows` vectors; `axis` is the name of its rows."""
    init = _named(nn.initializers.normal(size**-0.5), (axis, "embed"))
    return nn.Embed(rows, size, embedding_init=init, **options)


def layer_norm(epsilon: float, **options: Any) -> nn.LayerNorm:
    """Normalization to mean 0 and variance 1, then a scale and a bias."""
    scale, bias = nn.initializers.ones, nn.initializers.zeros
    return nn.LayerNorm(
        epsilon, scale_init=_named(scale, ("norm",)), bias_init=_named(bias, ("norm",)), **options
    )


def rms_norm(epsilon: float, **options: Any) -> nn.RMSNorm:
    """Normalization to mean square 1, then a scale."""
    return nn.RMSNorm(epsilon, scale_init=_named(nn.initializers.ones, ("norm",)), **options)


class Part(nn.Module):
    """A module of a model.

    Attributes:
        config: of the model.
        dtype: of activations and products.
        param_dtype: of the parameters that `init` draws.
    """

    config: Any
    dtype: Any
    param_dtype: Any

    @property
    def options(self) -> dict[str, Any]:
        """The dtypes, as options of the modules within."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


def dropout(module: nn.Module, rate: float, x: jax.Array) -> jax.Array:
    """Dropout in the calls that bring a key for it, `rngs={"dropout": key}`."""
    return nn.Dropout(rate)(x, deterministic=not module.has_rng("dropout"))


# ---- the stack ----------------------------------------------------------------------------------


def stack(
    block: type[nn.Module],
    layers: int,
    name: str,
    x: Any,
    *shared: Any,
    each: tuple[Any, ...] = (),
    scan: bool,
    remat: bool = False,
    policy: Callable[..., bool] | None = None,
    **fields: Any,
) -> tuple[Any, Any]:
    """What `layers` blocks make of `x`, one after the other, and what each gives besides, stacked.

    Args:
        block: a module of these `fields` that turns ``(x, *each, *shared)`` into ``(x, besides)``.
        layers: how many.
        name: of the module that has the parameters of all blocks stacked on axis 0; or of the
            modules ``name_0``, ``name_1``, ….
        x: what goes through the blocks.
        *shared: what all of them get alike.
        each: what they get each its own of: trees of arrays with layers on axis 0.
        scan: one compiled block in a loop, or each block compiled by itself.
        remat: whether the backward pass computes each block again instead of keeping its
            activations.
        policy: which of them are kept nevertheless; see `jax.checkpoint`.
        **fields: of the block.
    """
    if remat:
        # A scan already keeps XLA from merging the two forward passes.
        block = nn.remat(block, policy=policy, prevent_cse=not scan)
    if not scan:
        besides = []
        for i in range(layers):
            own = jax.tree.map(lambda a, i=i: a[i], each)
            x, y = block(**fields, name=f"{name}_{i}")(x, *own, *shared)
            besides.append(y)
        return x, jax.tree.map(lambda *y: jnp.stack(y), *besides)
    loop = nn.scan(
        block,
        length=layers,
        in_axes=(*[0] * len(each), *[nn.broadcast] * len(shared)),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return loop(**fields, name=name)(x, *each, *shared)
