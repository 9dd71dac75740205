"""Plain JAX: products, tables, convolutions, slots, experts, calls, and what is no site."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

import jlora
from jlora import Full, LoRA, Slots

from ._case import LORA, Case, Problem, entry, model, normal, normals

CASES: list[Case] = []
case = model(CASES)
rearranged = model(CASES, exact_at_zero=False)
built = entry(CASES)
ONE = 2 * (6 + 5)  # of w (6, 5)


# --------------------------------------------------------------------------------------------
# One product, however it is written. w: 6 inputs and 5 outputs.
# --------------------------------------------------------------------------------------------

# The shapes of w and x, and the product.
EXACT = {
    "matmul": ((6, 5), (3, 6), lambda w, x: x @ w),
    "matmul_vector": ((6, 5), (6,), lambda w, x: x @ w),
    "weight_left_matrix": ((5, 6), (6, 3), lambda w, x: w @ x),
    "dot_general_weight_left": (
        *((6, 5), (3, 6)),
        lambda w, x: lax.dot_general(w, x, (((0,), (1,)), ((), ()))),
    ),
    "transpose": ((5, 6), (3, 6), lambda w, x: x @ w.T),
    "expand_dims": ((6, 5), (1, 3, 6), lambda w, x: jnp.einsum("nbi,nio->nbo", x, w[None])),
    "squeeze": ((6, 1, 5), (3, 6), lambda w, x: x @ jnp.squeeze(w, 1)),
    "broadcast": (
        *((6, 5), (2, 3, 6)),
        lambda w, x: jnp.einsum("bsi,bio->bso", x, jnp.broadcast_to(w, (2, 6, 5))),
    ),
    "slice_outputs": ((6, 5), (3, 6), lambda w, x: x @ w[:, 1:4]),
    "slice_strided": ((6, 5), (3, 3), lambda w, x: x @ w[::2]),
    "dynamic_slice": (
        *((6, 5), (3, 4)),
        lambda w, x: x @ lax.dynamic_slice(w, (jnp.int32(1), jnp.int32(2)), (4, 3)),
    ),
    "flip": ((6, 5), (3, 6), lambda w, x: x @ w[::-1]),
    "stop_gradient": (*((6, 5), (3, 6)), lambda w, x: jnp.tanh(x @ w) + x @ lax.stop_gradient(w)),
    "optimization_barrier": ((6, 5), (3, 6), lambda w, x: x @ lax.optimization_barrier(w)),
    "copied": ((6, 5), (3, 6), lambda w, x: x @ jnp.array(w, copy=True)),
    "padded": ((6, 5), (3, 8), lambda w, x: x @ jnp.pad(w, ((1, 1), (0, 3)))),
    "unused_alias": ((6, 5), (3, 6), lambda w, x: (w.T.reshape(-1), x @ w)[1]),
    "used_twice": ((6, 5), (3, 6), lambda w, x: jnp.tanh(x @ w) + jnp.sin(x) @ w),
}
REARRANGED = {
    "split_outputs": (
        *((6, 5), (3, 6)),
        lambda w, x: [x @ part for part in jnp.split(w, (2,), axis=1)],
    ),
    "scaled": ((6, 5), (3, 6), lambda w, x: x @ (w / math.sqrt(6))),
    "scaled_by_traced": ((6, 5), (3, 6), lambda w, x: x @ (x[0, 0] * w)),
    "one_column": ((6, 5), (3, 6), lambda w, x: [x @ w[:, 0], x @ w[:, 3]]),
}
for add, table in ((case, EXACT), (rearranged, REARRANGED)):
    for name, (of_w, of_x, product) in table.items():
        subject = "lookup" if name.startswith("used") else "product"
        add(subject, ONE, of_w, of_x, name=name)(lambda p, x, product=product: product(p["w"], x))


@rearranged("product", ONE, (6, 5), (3, 6), strict=False)
def scaled_by_complex(p, x):
    """A scalar of another kind than A and B."""
    return jnp.abs(x @ (p["w"] * 1j) / (1 + 2j) + x[:, :5])


FORMED = (LoRA("^w$", rank=2, alpha=4, materialize=True),)


@case("product", ONE, (6, 5), (3, 6), rules=FORMED)
def padded_with_itself(p, x):
    """Zeros are what a factor is padded with; another value needs W + ΔW."""
    return x @ jnp.pad(p["w"], ((0, 0), (0, 2)), constant_values=p["w"][0, 0])


@rearranged("product", ONE, (6, 5), (3, 6), rules=FORMED)
def repeated_outputs(p, x):
    """Neither A nor B has the axis along which W is repeated."""
    return jnp.einsum("bi,nio->nbo", x @ p["w"] @ p["w"].T, jnp.broadcast_to(p["w"], (2, 6, 5)))


@case("product", 2 * ONE + 2 * (5 + 5), {"w": (2, 6, 5), "o": (5, 5)}, (3, 6), sites=2)
def unpacked(p, x):
    """A stack that is unpacked into its matrices: slices in JAX 0.10, `unstack` in 0.12."""
    q, k = p["w"]
    return ((x @ q) * (x @ k)) @ p["o"]


@case("product", 6 + 1, (6, 1), (1, 6), rules=(LoRA(rank=1, alpha=2),))
def one_output(p, x):
    """A single output: a size-1 axis must not be taken for another."""
    return x @ p["w"]


@rearranged("product", ONE + 2 * (5 + 4), {"w": (6, 5), "v": (5, 4)}, (3, 6), sites=2)
def weight_times_weight(p, x):
    """Two adapted weights are multiplied with each other first."""
    return x @ (p["w"] @ p["v"])


@case("lookup", 2 * (4 + 6) + 3 * ONE, {"w": (4, 6), "v": (3, 6, 5)}, (2, 4), sites=2)
def weights_multiplied_with_one_repeated(p, x):
    """Two adapted weights are multiplied: one that is repeated, and one that is a stack."""
    w = jnp.broadcast_to(p["w"], (3, 4, 6))
    return jnp.einsum("ti,nij->ntj", x, jnp.einsum("nio,noj->nij", w, p["v"]))


def query_key_value(p, x):
    """Products that share an activation so wide that it is read once."""
    q, k, v = (x @ p[n] for n in "qkv")
    return x + jnp.tanh(q) * k + v


@rearranged("layers", 2 * 3 * 2 * (32 + 32), dict.fromkeys("qkv", (2, 32, 32)), (3, 32), sites=3)
def query_key_value_in_scan_of_remat(p, x):
    """Scanned layers that are computed again, of products that share a wide activation."""
    layer = jax.checkpoint(lambda h, w: (query_key_value(w, h), None))
    return lax.scan(layer, x, p)[0]


@rearranged(
    *("product", 2 * (3 + 4), {"u": (3, 4), "v": (4, 3)}, (2, 3)),
    rules=(LoRA(".*", rank=1),),
    sites=2,
)
def two_weights_meet_along_a_new_axis(p, x):
    """Each is repeated along a batch axis, which neither A nor B has."""
    return jax.vmap(lambda u, v: x @ (u @ v))(p["u"][None], p["v"][None])


@case("product", 2 * (6 + 8), (6, 8), (3, 6))
def reshape_splits_outputs(p, x):
    """Stored (6, 8), used (6, 2, 4)."""
    return jnp.einsum("bd,dhk->bhk", x, p["w"].reshape(6, 2, 4))


@case("product", ONE + 2 * (6 + 4), {"w": (6, 5), "v": (6, 4)}, (3, 6), (3, 6), sites=2)
def concatenate_inputs(p, x, y):
    """[x y] times w above v."""
    wide = jnp.concatenate([x, y], axis=-1)
    return jnp.tanh(wide @ jnp.concatenate([p["w"][:, :4], p["v"]], axis=0))


# The dtypes of parameters and of arithmetic, and the product.
LOW_PRECISION = {
    "bfloat16_compute_over_float32": ("f4", "bfloat16", lambda w, x: x @ w.astype(x.dtype)),
    "bfloat16_base": ("bfloat16", "bfloat16", lambda w, x: x @ w),
    "bfloat16_base_promoted": ("bfloat16", "f4", lambda w, x: x @ w),
    "float16_base": ("f2", "f2", lambda w, x: x @ w),
    "bfloat16_result": (
        *("f4", "f4"),
        lambda w, x: jnp.matmul(x, w, preferred_element_type=jnp.bfloat16),
    ),
}
for low_name, (stored, computed, low_product) in LOW_PRECISION.items():

    def build_low(dtype, of_w=stored, of_x=computed, product=low_product):
        """The dtypes are the case's own."""
        params, x = normals(jnp.dtype(of_w), w=(6, 5)), normal("x", (3, 6), jnp.dtype(of_x))
        return Problem(lambda p, x: product(p["w"], x), params, (x,))

    how = {"float64": False, "tolerance": 5e-3 if stored == "f2" else 3e-2}
    how["strict"] = low_name != "bfloat16_base_promoted"
    built("product", ONE, low_name, **how)(build_low)


# --------------------------------------------------------------------------------------------
# Helpers under the user's own jit, called with the base model before.
# --------------------------------------------------------------------------------------------


@jax.jit
def prepare(w):
    """A helper that returns the weight itself, transposed."""
    return w.T, jnp.ones((), w.dtype)


@jax.jit
def layer_of(p, x):
    """A helper that takes the whole tree, with a leaf that it does not use."""
    return x @ p["w"] + p["b"][None], p["b"]


@case("call", ONE, (5, 6), (3, 6), called=True)
def jit_returns_the_weight(p, x):
    """What the jitted helper returns is the weight itself."""
    w, scale = prepare(p["w"])
    return x @ w * scale


@rearranged("call", ONE, {"w": (6, 5), "b": (5,), "unused": (4, 4)}, (3, 6), called=True)
def jit_passes_a_tree(p, x):
    """The jitted helper takes the whole tree."""
    return layer_of(p, x)


# --------------------------------------------------------------------------------------------
# Stacks of layers that Python unrolls. (See control.py for scans.)
# --------------------------------------------------------------------------------------------


@case("layers", 3 * 2 * (5 + 5), (3, 5, 5), (2, 5))
def unrolled_stack(p, x):
    """A stack of three layers in one leaf, indexed by a Python loop: A and B per layer."""
    for i in range(3):
        x = jnp.tanh(x @ p["w"][i])
    return x


# --------------------------------------------------------------------------------------------
# Embeddings.
# --------------------------------------------------------------------------------------------

IDS = np.array([[3, 0, 6], [1, 6, 2]])
TABLE = (LoRA("table", rank=2, alpha=4),)


def masked_lookup(w, ids):
    """Out of bounds the rows are NaN, as is their cotangent; the output is not."""
    rows = jnp.take(w, ids + 3, axis=0) ** 2
    return jnp.where((ids < 4)[..., None], rows, jnp.zeros((), w.dtype))


LOOKUPS = {
    "lookup_take_clip": lambda w, ids: jnp.take(w, ids + 5, axis=0, mode="clip"),
    "lookup_negative": lambda w, ids: w[ids - 7],
    "lookup_out_of_bounds": lambda w, ids: jnp.stack([w[ids + 3], w[ids - 10]]),
    "lookup_filled": lambda w, ids: w.at[jnp.stack([ids + 3, ids - 10])].get(
        mode="fill", fill_value=2
    ),
    "lookup_filled_and_masked": masked_lookup,
    "lookup_scalar": lambda w, ids: w[ids[0, 0]],
    "lookup_one_hot": lambda w, ids: jax.nn.one_hot(ids, 7, dtype=w.dtype) @ w,
    "lookup_scaled": lambda w, ids: w[ids] * jnp.sqrt(jnp.asarray(4, w.dtype)),
    "lookup_expanded": lambda w, ids: jnp.take(w[None], ids, axis=1),
    "lookup_broadcast": lambda w, ids: jnp.take(jnp.broadcast_to(w, (2, 7, 4)), ids, axis=1),
    "lookup_cast": lambda w, ids: w.astype(jnp.float32)[ids],
    "lookup_under_vmap": lambda w, ids: jax.vmap(lambda row: w[row])(ids),
}
for name, find in LOOKUPS.items():
    case(
        *("lookup", 2 * (7 + 4), {"table": (7, 4)}, IDS),
        rules=TABLE,
        name=name,
        float64=name != "lookup_cast",
        forward=name != "lookup_out_of_bounds",  # JAX's own derivatives of the two modes differ
    )(lambda p, ids, find=find: find(p["table"], ids))


@case("lookup", 3 * 2 * (7 + 4), {"table": (3, 7, 4)}, IDS, rules=TABLE)
def lookup_in_each_of_a_stack(p, ids):
    """Such as a table for each codebook."""
    return lax.map(lambda table: table[ids], p["table"])


@case(
    *("lookup", 3 * (7 + 4) + 2 * (4 + 4), {"table": (7, 4), "w": (4, 4)}, IDS),
    rules=(LoRA("table", rank=3, alpha=3), LORA),
    sites=2,
)
def tied_embedding(p, ids):
    """Lookup and output head from one leaf: one adapter, consistent in both."""
    return jnp.tanh(p["table"][ids] @ p["w"]) @ p["table"].T


@case("lookup", 2 * (7 + 4), {"table": (7, 4)}, (3, 4), rules=TABLE)
def tied_embedding_head_first(p, x):
    """The table is used as a head before it is used for a lookup."""
    ids = jnp.argmax(jnp.asarray(IDS)[..., None] == jnp.arange(7)[None, None], axis=-1)
    return jnp.einsum("bd,vd->bv", x, p["table"]), p["table"][ids]


@case("lookup", 2 * (7 + 4), {"table": (7, 4)}, IDS, rules=TABLE)
def tied_row_under_vmap(p, i):
    """As `eqx.nn.Embedding` has it, one row, mapped over the indices; the table is a head too."""
    h = jax.vmap(lambda i: p["table"][i])(i)
    return jnp.tanh(h) @ p["table"].T


# Lookups along an axis of length 1, and places that are counted from the end: the shapes, the
# model, and the number of trainable parameters at rank 1.
TWICE = np.array([0, 0])
ALONG_ONE = {
    "row_of_one": ((1, 4), (2, 4), lambda w, x: x + w[TWICE], 1 + 4),
    "row_of_one_tied": ((1, 4), (2, 4), lambda w, x: (x + w[TWICE]) @ w.T, 1 + 4),
    "matrix_of_one_by_token": (
        *((1, 4, 2), (2, 4)),
        lambda w, x: jnp.einsum("bi,bio->bo", x, w[TWICE]),
        4 + 2,
    ),
    "matrix_of_one_or_filled": (
        *((4, 2), (2, 4)),
        lambda w, x: jnp.einsum(
            "bi,bio->bo", x, w[None].at[np.arange(2)].get(mode="fill", fill_value=2)
        ),
        4 + 2,
    ),
    "row_of_two_indices": ((3, 1, 4), (2, 4), lambda w, x: x + w[TWICE, TWICE], 3 + 4),
    "place_before_the_first": (
        *((3, 2, 4), (3, 2)),
        lambda w, x: x @ w[jnp.int32(-5)],
        3 * (2 + 4),
    ),
    "slice_before_the_first": (
        *((3, 4), (3, 2)),
        lambda w, x: x @ lax.dynamic_slice_in_dim(w, jnp.int32(-4), 2, 0),
        3 + 4,
    ),
}
for name, (of_w, of_x, find, n) in ALONG_ONE.items():
    rearranged("lookup", n, of_w, of_x, rules=(LoRA("w", rank=1, alpha=2),), name=name)(
        lambda p, x, find=find: find(p["w"], x)
    )


# --------------------------------------------------------------------------------------------
# Convolutions with layouts that Flax does not use. (See linen.py for the others.)
# --------------------------------------------------------------------------------------------


def conv(numbers, x, w, *window, **options):
    """A convolution, by default with stride 1 and the shape of x."""
    window = window or ((1,) * (x.ndim - 2), "SAME")
    numbers = tuple(numbers.split())
    return lax.conv_general_dilated(x, w, *window, dimension_numbers=numbers, **options)


@case("convolution", 2 * (3 * 3 * 4 + 5), (3, 3, 4, 5), (0, 5, 5, 4), grad=False, forward=False)
def conv_of_an_empty_batch(p, x):
    return conv("NHWC HWIO NHWC", x, p["w"])


@case("convolution", 2 * (3 * 2 * 3 + 4), (4, 3, 3, 2), (2, 3, 5, 6))
def conv_nchw(p, x):
    """PyTorch's layouts: NCHW and OIHW."""
    return conv("NCHW OIHW NCHW", x, p["w"])


@case("convolution", 2 * (4 + 5), (4, 5), (2, 6, 4), rules=FORMED)
def one_matrix_for_the_window(p, x):
    return conv("NWC WIO NWC", x, jnp.broadcast_to(p["w"], (3, 4, 5))) + x @ p["w"]


@case(
    *("convolution", 2 * (3 * 4 + 5) + 2 * (1 * 5 + 4)),
    *({"w": (3, 4, 5), "v": (1, 5, 4)}, (2, 6, 4)),
    sites=2,
)
def conv_used_twice(p, x):
    """One kernel over two inputs, one of them under vmap, then a kernel of width 1."""
    once = partial(conv, "NWC WIO NWC")
    each = jax.vmap(lambda one: once(one[None], p["w"])[0])(jnp.sin(x))
    return once(jnp.tanh(once(x, p["w"]) + each), p["v"])


@rearranged("convolution", 2 * (3 * 3 + 4 * 2), {"k": (3, 3, 4, 2)}, (2, 5, 5, 4))
def depthwise_kernel_of_multipliers(p, x):
    """Keras keeps (k, k, channels, multiplier), and reshapes: A by the window, B by the rest."""
    return conv("NHWC HWIO NHWC", x, p["k"].reshape(3, 3, 1, 4 * 2), feature_group_count=4)


@case("convolution", 2 * (3 * 3 * 4 + 6), {"k": (3, 3, 4, 6)}, (4, 5, 5, 4))
def convolution_of_grouped_batches(p, x):
    """`batch_group_count`: each half of the batch has half of the outputs."""
    return conv("NHWC HWIO NHWC", x, p["k"], batch_group_count=2)


# --------------------------------------------------------------------------------------------
# Fused kernels.
# --------------------------------------------------------------------------------------------


def attend(q, k, v):
    """Attention of one head."""
    scores = jnp.einsum("...qd,...kd->...qk", q, k) / math.sqrt(q.shape[-1])
    return jax.nn.softmax(scores, axis=-1) @ v


def concatenated(p, x):
    """Three leaves are concatenated, multiplied once, and the product is split."""
    kernel = jnp.concatenate([p["q"], p["k"], p["v"]], axis=-1)
    bias = jnp.concatenate([p["qb"], p["kb"], p["vb"]])
    return attend(*jnp.split(x @ kernel + bias[None], 3, axis=-1))


def as_stack(p, x):
    """Three leaves become one of shape (d, 3, h, k)."""
    kernel = jnp.stack([p["q"], p["k"], p["v"]], axis=1)
    return attend(*jnp.einsum("sd,dnhk->nhsk", x, kernel))


MATRICES = dict.fromkeys("qkv", (6, 4)) | dict.fromkeys(("qb", "kb", "vb"), (4,))
HEADS = dict.fromkeys("qkv", (6, 2, 4))
for name, apply, pattern, n, of_each, width in (
    ("concatenate_adapted_all", concatenated, "^[qkv]$", 3, MATRICES, 4),
    ("concatenate_adapted_one", concatenated, "^k$", 1, MATRICES, 4),
    ("stack_adapted_one", as_stack, "^k$", 1, HEADS, 8),
):
    rules = (LoRA(pattern, rank=2, alpha=4),)
    trained = n * 2 * (6 + width)
    rearranged("slots", trained, of_each, (3, 6), rules=rules, sites=n, name=name)(apply)


@rearranged("slots", 2 * (4 + 6), {"w": (4, 6), "v": (4, 6)}, (2, 4), rules=(LoRA("w", rank=2),))
def stack_of_a_joined_weight(p, x):
    """[W W] over [V V], of which only W is adapted."""
    double = [jnp.concatenate([p[k], p[k]], axis=1) for k in ("w", "v")]
    return jnp.einsum("bi,sio->sbo", x, jnp.stack(double))


@rearranged(
    *("slots", 2 * 2 * (4 + 6), {"w": (4, 6), "v": (4, 6)}, (2, 4)),
    rules=(LoRA("w|v", rank=2),),
    sites=2,
)
def join_of_repeated(p, x):
    """W three times, and V twice, as a stack of five."""
    stack = [jnp.broadcast_to(p[k], (n, *p[k].shape)) for k, n in (("w", 3), ("v", 2))]
    xs = jnp.stack([x, -x, 2 * x, 1 + x, x])
    return jnp.einsum("sbi,sio->sbo", xs, jnp.concatenate(stack))


def split_last(y):
    """Attention of q, k and v side by side."""
    return attend(*jnp.split(y, 3, axis=-1))


# The shape, the model, outputs of one slot, which of the output axes is fused, and the slots.
FUSED = {
    "slots_split_after": ((6, 12), lambda w, x: split_last(x @ w), 4, 0, (0, 2)),
    "slots_transposed": ((12, 6), lambda w, x: split_last(x @ w.T), 4, 0, (0, 2)),
    "slots_reshaped": (
        (6, 12),
        lambda w, x: attend(*jnp.einsum("sd,dnhk->nhsk", x, w.reshape(6, 3, 2, 2))),
        *(4, 0, (0, 2)),
    ),
    "slots_heads": (  # those of the last output axis, in every head
        (6, 2, 12),
        lambda w, x: split_last(jnp.einsum("sd,dhk->hsk", x, w)),
        *(2 * 4, 1, (0, 2)),
    ),
}
for name, (of_w, apply, width, axis, slots) in FUSED.items():
    rearranged(
        *("slots", len(slots) * 2 * (6 + width), of_w, (3, 6)),
        rules=(LoRA("^w$", rank=2, alpha=4, slots=Slots(3, slots, axis)),),
        name=name,
    )(lambda p, x, apply=apply: apply(p["w"], x))


@rearranged(
    *("slots", 2 * 2 * 2 * (5 + 5), (2, 5, 15), (3, 5)),  # two layers, two slots
    rules=(LoRA("w", rank=2, alpha=4, slots=Slots(3, (0, 2))),),
)
def slots_scanned(p, x):
    """A scanned stack of fused kernels: (layers, d, 3·d)."""
    return lax.scan(lambda x, w: (x + split_last(x @ w), None), x, p["w"])[0]


# --------------------------------------------------------------------------------------------
# Mixtures of experts. w: (3 experts, 6, 5).
# --------------------------------------------------------------------------------------------


@case("experts", 3 * ONE, (3, 6, 5), (3, 4, 6))
def experts_einsum(p, x):
    """Experts are a batch axis of the product."""
    return jnp.einsum("ecd,edf->ecf", x, p["w"])


@case(
    *("experts", 2 * 3 * ONE, {"up": (3, 6, 5), "down": (3, 5, 6)}, (7, 6)),
    sites=2,
    vmap=False,
    twice=False,
)
def experts_ragged_mlp(p, x):
    """Routing, sort, two ragged products, unsort: the usual dropless layer."""
    gates = jax.nn.softmax(x[:, :3], axis=-1)
    expert = jnp.argmax(gates, axis=-1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=3).astype(jnp.int32)
    h = jax.nn.gelu(lax.ragged_dot(x[order], p["up"], sizes))
    out = lax.ragged_dot(h, p["down"], sizes)[jnp.argsort(order)]
    return out * jnp.max(gates, axis=-1, keepdims=True)


@case("experts", 3 * ONE, (3, 6, 5), (2, 6), np.array([[2, 0], [1, 2]]))
def experts_gathered_top_two(p, x, expert):
    """Two experts for every token, gathered by take."""
    return jnp.einsum("ti,tkio->tko", x, jnp.take(p["w"], expert, axis=0))


@rearranged("experts", 3 * 2 * (4 + 5), (3, 4, 5), np.array([1, 2, 0, 0]), (4, 4))
def experts_looked_up_under_vmap(p, i, x):
    """One matrix of a stack for each token."""
    return jax.vmap(lambda i, x: x @ p["w"][i])(i, x)


@case("experts", 2 * 3 * 2 * (4 + 4), (3, 2, 4, 4), (3, 5, 4))
def experts_scanned(p, x):
    """Layers along axis 1, as MaxText's, each of three experts."""
    layers = jnp.moveaxis(p["w"], 1, 0)
    return lax.scan(lambda x, w: (jnp.tanh(jnp.einsum("ecd,edf->ecf", x, w)), None), x, layers)[0]


SHARING = {  # the parameters of a case where experts share A, and where they share B
    experts_einsum: (2 * (6 + 3 * 5), 2 * (3 * 6 + 5)),
    experts_ragged_mlp: (2 * (6 + 5 + 3 * (5 + 6)), 2 * (3 * (6 + 5) + 5 + 6)),
    experts_gathered_top_two: (2 * (6 + 3 * 5), 2 * (3 * 6 + 5)),
    experts_looked_up_under_vmap: (2 * (4 + 3 * 5), 2 * (3 * 4 + 5)),
    experts_scanned: (2 * 2 * (4 + 3 * 4), 2 * 2 * (3 * 4 + 4)),
}
for moe, sizes in SHARING.items():
    for share, size in zip(("inputs", "outputs"), sizes, strict=True):
        rules = (LoRA(rank=2, alpha=4, share=share),)
        name = f"{moe.name}_that_share_{share}"
        CASES.append(replace(moe, name=name, rules=rules, trainable=size))
SHARING_FIELDS = {  # likewise of w (3 experts, 6, 4), under rules with more fields
    "slots": (Slots(2, (1,)), 2 * (6 + 3 * 2), 2 * (3 * 6 + 2)),
    "frozen": (("a",), 2 * 3 * 4, 2 * 4),
}
for field, (given, *sizes) in SHARING_FIELDS.items():
    for share, size in zip(("inputs", "outputs"), sizes, strict=True):
        rules = (LoRA("w", rank=2, alpha=4, share=share, **{field: given}),)
        name = f"experts_with_{field}_that_share_{share}"
        case("experts", size, (3, 6, 4), (3, 5, 6), rules=rules, name=name)(
            lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["w"])
        )


@rearranged("experts", 3 * 2 * (4 + 5), (3, 4, 5), (2, 6, 4))
def stack_repeated_along_itself(p, x):
    """`jnp.repeat` over the axis of a stack."""
    return jnp.einsum("bln,lnm->blm", x, jnp.repeat(p["w"], 2, axis=0))


@rearranged("experts", 3 * 2 * (4 + 5), (3, 4, 5), (2, 6, 4))
def stack_tiled(p, x):
    """`jnp.tile` over the axis of a stack."""
    return jnp.einsum("bln,lnm->blm", x, jnp.tile(p["w"], (2, 1, 1)))


@rearranged(
    *("experts", 2 * 2 * (4 + 4), {"u": (4, 4), "v": (4, 4)}, (3, 4)),
    rules=(LoRA("u", rank=2, alpha=4, dtype=jnp.float32), LoRA("v", rank=2, alpha=4)),
    sites=2,
)
def stacked_with_factors_of_two_dtypes(p, x):
    """Leaves joined to a stack, whose A and B differ in dtype."""
    weights = jnp.stack([p["u"], p["v"]])
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0]


# --------------------------------------------------------------------------------------------
# What a call may look like.
# --------------------------------------------------------------------------------------------


@struct.dataclass
class Output:
    """An output with an array, a missing one, a nested container and a static field."""

    logits: jax.Array
    hidden: tuple[jax.Array, ...]
    cache: jax.Array | None
    label: str = struct.field(pytree_node=False, default="output")


@case("call", 2 * (6 + 6) + ONE, {"w": (6, 6), "v": (6, 5)}, (3, 6), sites=2)
def output_tree(p, x):
    """Nested pytrees, a dataclass, None and integers come out as they are."""
    h = jnp.tanh(x @ p["w"])
    logits = h @ p["v"]
    extra = {"argmax": jnp.argmax(x, axis=-1), "none": None, "list": [h, (logits,)]}
    return Output(logits=logits, hidden=(x, h), cache=None), extra


@case("call", ONE, (6, 5), (3, 6), np.array(2), jit=False)
def python_if_on_a_value(p, x, n):
    """Python control flow on the value of an argument."""
    if x.sum() > 0:
        x = -x
    for _ in range(int(n)):
        x = jnp.tanh(x)
    return x @ p["w"] if float(x[0, 0]) < 10 else x[:, :5]


@built("call", ONE, jit=False)
def flags_and_keyword_arguments(dtype):
    """Flags, strings, None, functions and containers as positional and keyword arguments."""

    def apply(p, x, train, mode, *, activation, batch, scale=1.0):
        if train is not True or mode != "double" or batch["mask"] is not None:
            raise ValueError("the arguments changed on their way")
        return activation(x @ p["w"]) * scale + batch["shift"][0]

    batch = {"shift": [normal("s", (1, 5), dtype)], "mask": None}
    given = {"activation": jnp.tanh, "batch": batch, "scale": 2.0}
    args = normal("x", (3, 6), dtype), True, "double"
    return Problem(apply, normals(dtype, w=(6, 5)), args, given)


@case("call", ONE, (6, 5), (3, 6))
def debug_print(p, x):
    """`jax.debug.print` of an activation, outside and inside of jit."""
    helper = jax.jit(lambda h: (jax.debug.print("mean {}", h.mean()), jnp.tanh(h))[1])
    h = x @ p["w"]
    jax.debug.print("norm {norm}", norm=jnp.linalg.norm(h))
    return helper(h)


@case(
    *("call", ONE + 5 + 5 * 4, {"w": (6, 5), "b": (5,), "v": (5, 4)}, (3, 6)),
    rules=(LoRA("^w$", rank=2, alpha=4), Full("^b$|^v$")),
)
def trained_in_full(p, x):
    """A bias and a head trained in full beside a low-rank site."""
    return jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"]


@built("call", 2 * (16 + 16), exact_at_zero=False)
def adapted_twice(dtype):
    """An adapted apply is adapted again: with many tokens too."""
    inner = jlora.transform(lambda p, x: x @ p["w"], LORA)
    params, x = normals(dtype, w=(16, 16)), normal("x", (64, 16), dtype)
    base, adapter = inner.init(jax.random.key(0), params, x)
    adapter = jax.tree.map(lambda v: v + jnp.asarray(0.1, v.dtype), adapter)
    return Problem(lambda p, x: inner.apply(p, adapter, x), base, (x,))


# --------------------------------------------------------------------------------------------
# What is no site. In each, w is the only one.
# --------------------------------------------------------------------------------------------


@case("no_site", 2 * (5 + 5), (5, 5), (5, 5))
def activation_of_the_weights_shape(p, x):
    """Activations, and a product of two of them, have the shape of the weight."""
    h = jnp.tanh(x @ p["w"])
    return h @ x + x @ h.T


OTHERS = {"position": (8, 6), "token": (1, 1, 6), "shift": (4, 5), "gate": (5, 4)}
OTHERS |= dict.fromkeys(("returned", "summed", "unused"), (4, 4))


@case("no_site", ONE, {"w": (6, 5), **OTHERS}, (2, 3, 6))
def added_joined_and_measured(p, x):
    """What is added, joined to activations or bent, is an activation; one leaf is unused."""
    token = jnp.broadcast_to(p["token"], (2, 1, 6))
    x = jnp.concatenate([token, x], axis=1) + p["position"][None, :4]
    y = (x @ p["w"] + p["shift"][None]) @ jnp.tanh(p["gate"])
    return y, p["returned"], jnp.sum(p["summed"] ** 2)


@case("no_site", ONE, {"w": (6, 5), "query": (3, 6)}, (2, 4, 6))
def queries_repeated_for_two_rows(p, x):
    """Learned queries, repeated along the batch, are activations of the product with w."""
    query = jnp.broadcast_to(p["query"], (2, 3, 6))
    return jnp.concatenate([query, x], axis=1) @ p["w"], jnp.tanh(query @ p["w"])


@case("no_site", ONE, {"w": (6, 5), "token": (7, 6), "position": (8, 6)}, IDS)
def looked_up_positions(p, ids):
    """Lookups of tokens and positions are embeddings: all-linear leaves them alone."""
    return (p["token"][ids] + p["position"][jnp.arange(3)][None]) @ p["w"]
