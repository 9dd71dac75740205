"""Plain JAX: products, tables, convolutions, slots, experts, calls, and what is no site."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

import jlora
from jlora import Full, LoRA, Slots

from ._case import Case, Problem, entry, normal, normals

CASES: list[Case] = []
case = partial(entry, CASES)
LORA = LoRA(rank=2, alpha=4)  # all-linear


# --------------------------------------------------------------------------------------------
# One product, however it is written. Unless it says otherwise, w: (6, 5).
# --------------------------------------------------------------------------------------------


def of_one_leaf(name, w_shape, x_shape, apply, **fields) -> None:
    """Adds `apply(w, x)`."""

    def build(dtype):
        params, x = normals(dtype, w=w_shape), normal("x", x_shape, dtype)
        return Problem(lambda p, x: apply(p["w"], x), params, (x,))

    CASES.append(Case(name=name, build=build, sites=1, **fields))


def products() -> None:
    """Adds every way to write x·w with one leaf of 6 inputs and 5 outputs."""
    shapes = {
        "matmul": ((6, 5), (3, 6), lambda w, x: x @ w),
        "matmul_vector": ((6, 5), (6,), lambda w, x: x @ w),
        "matmul_batched": ((6, 5), (2, 3, 6), lambda w, x: x @ w),
        "matmul_highest": ((6, 5), (3, 6), lambda w, x: jnp.matmul(x, w, precision="highest")),
        "weight_left_vector": ((5, 6), (6,), lambda w, x: w @ x),
        "weight_left_matrix": ((5, 6), (6, 3), lambda w, x: w @ x),
        "inner": ((5, 6), (3, 6), lambda w, x: jnp.inner(x, w)),
        "dot_general": (
            (5, 6),
            (6, 2, 3),
            lambda w, x: lax.dot_general(x, w, (((0,), (1,)), ((), ()))),
        ),
        "dot_general_weight_left": (
            (6, 5),
            (3, 6),
            lambda w, x: lax.dot_general(w, x, (((0,), (1,)), ((), ()))),
        ),
        "einsum": ((6, 5), (2, 3, 6), lambda w, x: jnp.einsum("bsd,df->bsf", x, w)),
        "einsum_weight_left": ((6, 5), (3, 6), lambda w, x: jnp.einsum("io,bi->bo", w, x)),
        "einsum_transposed_result": ((6, 5), (3, 6), lambda w, x: jnp.einsum("bi,io->ob", x, w)),
        "einsum_ellipsis": ((6, 5), (2, 3, 6), lambda w, x: jnp.einsum("...d,df->...f", x, w)),
        "transpose": ((5, 6), (3, 6), lambda w, x: x @ w.T),
        "swapaxes": ((5, 6), (3, 6), lambda w, x: x @ jnp.swapaxes(w, 0, 1)),
        "expand_dims": ((6, 5), (1, 3, 6), lambda w, x: jnp.einsum("nbi,nio->nbo", x, w[None])),
        "squeeze": ((6, 1, 5), (3, 6), lambda w, x: x @ jnp.squeeze(w, 1)),
        "broadcast": (
            (6, 5),
            (2, 3, 6),
            lambda w, x: jnp.einsum("bsi,bio->bso", x, jnp.broadcast_to(w, (2, 6, 5))),
        ),
        "slice_inputs": ((6, 5), (3, 4), lambda w, x: x @ w[:4]),
        "slice_outputs": ((6, 5), (3, 6), lambda w, x: x @ w[:, 1:4]),
        "slice_strided": ((6, 5), (3, 3), lambda w, x: x @ w[::2]),
        "dynamic_slice": (
            (6, 5),
            (3, 4),
            lambda w, x: x @ lax.dynamic_slice(w, (jnp.int32(1), jnp.int32(2)), (4, 3)),
        ),
        "slice_twice": ((6, 5), (3, 6), lambda w, x: jnp.tanh(x[:, :2] @ w[:2]) + x[:, 2:] @ w[2:]),
        "split_outputs": (
            (6, 5),
            (3, 6),
            lambda w, x: [x @ part for part in jnp.split(w, (2,), axis=1)],
        ),
        "flip": ((6, 5), (3, 6), lambda w, x: x @ w[::-1]),
        "scaled": ((6, 5), (3, 6), lambda w, x: x @ (w / math.sqrt(6))),
        "negated": ((6, 5), (3, 6), lambda w, x: x @ -w),
        "scaled_by_traced": ((6, 5), (3, 6), lambda w, x: x @ (x[0, 0] * w)),
        "stop_gradient": (
            (6, 5),
            (3, 6),
            lambda w, x: jnp.tanh(x @ w) + x @ lax.stop_gradient(w),
        ),
        "optimization_barrier": ((6, 5), (3, 6), lambda w, x: x @ lax.optimization_barrier(w)),
        "copied": ((6, 5), (3, 6), lambda w, x: x @ jnp.array(w, copy=True)),
        "padded": (
            (6, 5),
            (3, 8),
            lambda w, x: x @ jnp.pad(w, ((1, 1), (0, 3))),
        ),
        "unused_alias": ((6, 5), (3, 6), lambda w, x: (w.T.reshape(-1), x @ w)[1]),
        "used_twice": ((6, 5), (3, 6), lambda w, x: jnp.tanh(x @ w) + jnp.sin(x) @ w),
        "used_in_both_directions": ((6, 5), (3, 6), lambda w, x: jnp.tanh(x @ w) @ w.T),
    }
    rearranged = {"slice_twice", "split_outputs", "scaled", "negated", "scaled_by_traced"}
    for name, problem in shapes.items():
        of_one_leaf(
            name,
            *problem,
            subject="lookup" if name.startswith("used") else "product",
            rules=(LORA,),
            trainable=2 * (6 + 5),
            exact_at_zero=name not in rearranged,
        )


products()


@case(
    subject="product",
    rules=(LORA,),
    sites=1,
    trainable=2 * (6 + 5),
    strict=False,
    exact_at_zero=False,
)
def scaled_by_complex(dtype):
    """A scalar of another kind than A and B."""
    return Problem(
        lambda p, x: jnp.abs(x @ (p["w"] * 1j) / (1 + 2j) + x[:, :5]),
        normals(dtype, w=(6, 5)),
        (normal("x", (3, 6), dtype),),
    )


@case(
    subject="product",
    rules=(LoRA("^w$", rank=2, alpha=4, materialize=True),),
    sites=1,
    trainable=2 * (6 + 5),
)
def padded_with_itself(dtype):
    """Zeros are what a factor is padded with; another value needs W + ΔW."""
    return Problem(
        lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (0, 2)), constant_values=p["w"][0, 0]),
        normals(dtype, w=(6, 5)),
        (normal("x", (3, 6), dtype),),
    )


@case(subject="product", rules=(LORA,), sites=2, trainable=2 * 2 * (6 + 5) + 2 * (5 + 5))
def unpacked(dtype):
    """A stack that is unpacked into its matrices: slices in JAX 0.10, `unstack` in 0.12."""

    def apply(p, x):
        q, k = p["w"]
        return ((x @ q) * (x @ k)) @ p["o"]

    return Problem(apply, normals(dtype, w=(2, 6, 5), o=(5, 5)), (normal("x", (3, 6), dtype),))


@case(subject="product", rules=(LoRA(rank=1, alpha=2),), sites=1, trainable=1 * (6 + 1))
def one_output(dtype):
    """A single output: a size-1 axis must not be taken for another."""
    return Problem(lambda p, x: x @ p["w"], normals(dtype, w=(6, 1)), (normal("x", (1, 6), dtype),))


@case(subject="product", rules=(LORA,), sites=2, trainable=2 * (4 + 5) + 2 * (5 + 6))
def einsum_three_operands(dtype):
    """Three operands; x is contracted with w, then the result with v."""
    return Problem(
        lambda p, x: jnp.einsum("bi,io,oj->bj", x, p["w"], p["v"]),
        normals(dtype, w=(4, 5), v=(5, 6)),
        (normal("x", (2, 4), dtype),),
    )


@case(
    subject="product",
    rules=(LORA,),
    sites=2,
    trainable=2 * (6 + 5) + 2 * (5 + 4),
    exact_at_zero=False,
)
def weight_times_weight(dtype):
    """Two adapted weights are multiplied with each other first."""
    return Problem(
        lambda p, x: x @ (p["w"] @ p["v"]),
        normals(dtype, w=(6, 5), v=(5, 4)),
        (normal("x", (3, 6), dtype),),
    )


@case(subject="product", rules=(LORA,), sites=1, trainable=2 * (4 + 3 * 5))
def partial_contraction(dtype):
    """A bilinear form: the first product contracts i, the second one j."""

    def apply(p, x, y):
        return jnp.einsum("bjo,bj->bo", jnp.einsum("bi,ijo->bjo", x, p["w"]), y)

    args = normal("x", (2, 4), dtype), normal("y", (2, 3), dtype)
    return Problem(apply, normals(dtype, w=(4, 3, 5)), args)


@case(subject="product", rules=(LORA,), sites=1, trainable=2 * (6 + 8))
def reshape_splits_outputs(dtype):
    """Stored (6, 8), used (6, 2, 4)."""
    return Problem(
        lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"].reshape(6, 2, 4)),
        normals(dtype, w=(6, 8)),
        (normal("x", (3, 6), dtype),),
    )


@case(subject="product", rules=(LORA,), sites=1, trainable=2 * (6 + 5))
def reshape_adds_an_axis(dtype):
    """Stored (6, 5), used (6, 1, 5): the axis of length 1 is contracted, so it is no output."""
    return Problem(
        lambda p, x: jnp.einsum("bkh,khd->bd", x, p["w"].reshape(6, 1, 5)),
        normals(dtype, w=(6, 5)),
        (normal("x", (3, 6, 1), dtype),),
    )


@case(subject="product", rules=(LORA,), sites=2, trainable=2 * (6 + 5) + 2 * (6 + 4))
def concatenate_inputs(dtype):
    """[x y] times w above v."""

    def apply(p, x, y):
        wide = jnp.concatenate([x, y], axis=-1)
        return jnp.tanh(wide @ jnp.concatenate([p["w"][:, :4], p["v"]], axis=0))

    args = normal("x", (3, 6), dtype), normal("y", (3, 6), dtype)
    return Problem(apply, normals(dtype, w=(6, 5), v=(6, 4)), args)


# The dtypes of parameters and of arithmetic, and the product.
LOW_PRECISION = {
    "bfloat16_compute_over_float32": ("f4", "bfloat16", lambda w, x: x @ w.astype(x.dtype)),
    "bfloat16_cast_of_both": (
        *("f4", "f4"),
        lambda w, x: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(x.dtype),
    ),
    "bfloat16_there_and_back": (
        *("f4", "f4"),
        lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32),
    ),
    "bfloat16_base": ("bfloat16", "bfloat16", lambda w, x: x @ w),
    "bfloat16_base_float32_compute": ("bfloat16", "f4", lambda w, x: x @ w.astype(x.dtype)),
    "bfloat16_base_promoted": ("bfloat16", "f4", lambda w, x: x @ w),
    "bfloat16_base_float32_accumulation": (
        *("bfloat16", "bfloat16"),
        lambda w, x: jnp.matmul(x, w, preferred_element_type=jnp.float32),
    ),
    "float16_base": ("f2", "f2", lambda w, x: x @ w),
}
for low_name, (stored, computed, low_product) in LOW_PRECISION.items():

    def build_low(dtype, of_w=stored, of_x=computed, product=low_product):
        """The dtypes are the case's own."""
        params = normals(jnp.dtype(of_w), w=(6, 5))
        return Problem(
            lambda p, x: product(p["w"], x), params, (normal("x", (3, 6), jnp.dtype(of_x)),)
        )

    CASES.append(
        Case(
            name=low_name,
            subject="product",
            build=build_low,
            rules=(LORA,),
            sites=1,
            trainable=2 * (6 + 5),
            float64=False,
            tolerance=5e-3 if stored == "f2" else 3e-2,
            strict=low_name != "bfloat16_base_promoted",
        )
    )


# --------------------------------------------------------------------------------------------
# Helpers under the user's own jit, called with the base model before.
# --------------------------------------------------------------------------------------------


def called(apply, params, *args):
    """A problem whose functions have been traced with the base parameters before."""
    apply(params, *args)
    return Problem(apply, params, args)


@case(subject="jit", rules=(LORA,), sites=1, trainable=2 * (6 + 5), exact_at_zero=False)
def jit_helper(dtype):
    """The weight is an argument of a jitted helper."""
    helper = jax.jit(lambda w, x: jnp.tanh(x @ w))
    return called(
        lambda p, x: helper(p["w"], x), normals(dtype, w=(6, 5)), normal("x", (3, 6), dtype)
    )


@case(subject="jit", rules=(LoRA("^v$", rank=2, alpha=4),), sites=1, trainable=2 * (5 + 5))
def jit_helper_on_two_weights(dtype):
    """One cached trace serves two weights, of which only the second is adapted."""
    helper = jax.jit(lambda w, x: x @ w)
    return called(
        lambda p, x: helper(p["v"], jnp.tanh(helper(p["w"], x))),
        normals(dtype, w=(5, 5), v=(5, 5)),
        normal("x", (3, 5), dtype),
    )


@case(subject="jit", rules=(LORA,), sites=1, trainable=2 * (5 + 6), exact_at_zero=False)
def jit_static_argument(dtype):
    """A static flag of the jitted helper decides how the weight is used."""

    @partial(jax.jit, static_argnames="transposed")
    def helper(w, x, *, transposed):
        return x @ (w.T if transposed else w)

    return called(
        lambda p, x: helper(p["w"], x, transposed=True),
        normals(dtype, w=(5, 6)),
        normal("x", (3, 6), dtype),
    )


@case(subject="jit", rules=(LORA,), sites=1, trainable=2 * (5 + 6))
def jit_returns_the_weight(dtype):
    """What the jitted helper returns is the weight itself, transposed."""
    prepare = jax.jit(lambda w: (w.T, jnp.ones((), w.dtype)))

    def apply(p, x):
        w, scale = prepare(p["w"])
        return x @ w * scale

    return called(apply, normals(dtype, w=(5, 6)), normal("x", (3, 6), dtype))


@case(subject="jit", rules=(LORA,), sites=1, trainable=2 * (6 + 5), exact_at_zero=False)
def jit_passes_a_tree(dtype):
    """The jitted helper takes the whole tree, with a leaf that it does not use."""
    helper = jax.jit(lambda p, x: (x @ p["w"] + p["b"][None], p["b"]))
    return called(
        lambda p, x: helper(p, x),
        normals(dtype, w=(6, 5), b=(5,), unused=(4, 4)),
        normal("x", (3, 6), dtype),
    )


# --------------------------------------------------------------------------------------------
# Stacks of layers that Python unrolls. (See control.py for scans.)
# --------------------------------------------------------------------------------------------


@case(subject="layers", rules=(LORA,), sites=1, trainable=3 * 2 * (5 + 5))
def unrolled_stack(dtype):
    """A stack of three layers in one leaf, indexed by a Python loop: A and B per layer."""

    def apply(p, x):
        for i in range(3):
            x = jnp.tanh(x @ p["w"][i])
        return x

    return Problem(apply, normals(dtype, w=(3, 5, 5)), (normal("x", (2, 5), dtype),))


# --------------------------------------------------------------------------------------------
# Embeddings.
# --------------------------------------------------------------------------------------------

IDS = ((3, 0, 6), (1, 6, 2))


def masked_lookup(w, ids):
    """Out of bounds the rows are NaN, as is their cotangent; the output is not."""
    return jnp.where(
        (ids < 4)[..., None], jnp.take(w, ids + 3, axis=0) ** 2, jnp.zeros((), w.dtype)
    )


def lookups() -> None:
    """Adds every way to look up rows of a (7, 4) table, adapted by name."""
    ways = {
        "lookup_index": lambda w, ids: w[ids],
        "lookup_take": lambda w, ids: jnp.take(w, ids, axis=0),
        "lookup_take_clip": lambda w, ids: jnp.take(w, ids + 5, axis=0, mode="clip"),
        "lookup_negative": lambda w, ids: w[ids - 7],
        "lookup_out_of_bounds": lambda w, ids: jnp.stack([w[ids + 3], w[ids - 10]]),
        "lookup_filled": lambda w, ids: w.at[ids + 3].get(mode="fill", fill_value=2),
        "lookup_filled_and_masked": masked_lookup,
        "lookup_scalar": lambda w, ids: w[ids[0, 0]],
        "lookup_constant": lambda w, ids: w[jnp.array([5, 1])] + w[ids[:, 0]],
        "lookup_one_hot": lambda w, ids: jax.nn.one_hot(ids, 7, dtype=w.dtype) @ w,
        "lookup_scaled": lambda w, ids: w[ids] * jnp.sqrt(jnp.asarray(4, w.dtype)),
        "lookup_expanded": lambda w, ids: jnp.take(w[None], ids, axis=1),
        "lookup_broadcast": lambda w, ids: jnp.take(jnp.broadcast_to(w, (2, 7, 4)), ids, axis=1),
        "lookup_columns": lambda w, ids: jnp.take(w.T, ids, axis=1),
        "lookup_cast": lambda w, ids: w.astype(jnp.float32)[ids],
        "lookup_under_vmap": lambda w, ids: jax.vmap(lambda row: w[row])(ids),
    }
    for name, apply in ways.items():

        def build(dtype, apply=apply):
            params = normals(dtype, table=(7, 4))
            return Problem(lambda p, ids: apply(p["table"], ids), params, (jnp.array(IDS),))

        CASES.append(
            Case(
                name=name,
                subject="lookup",
                build=build,
                rules=(LoRA("table", rank=2, alpha=4),),
                sites=1,
                trainable=2 * (7 + 4),
                float64=name != "lookup_cast",
                # Out of bounds, JAX's own derivatives of the two modes differ.
                forward=name != "lookup_out_of_bounds",
            )
        )


lookups()


@case(subject="lookup", rules=(LoRA("table", rank=2, alpha=4),), sites=1, trainable=2 * (7 + 4))
def lookup_stored_transposed(dtype):
    """A table stored (d, vocabulary): inputs are its last axis."""
    return Problem(
        lambda p, ids: jnp.take(p["table"], ids, axis=1),
        normals(dtype, table=(4, 7)),
        (jnp.array(IDS),),
    )


@case(
    subject="lookup",
    rules=(LoRA("table", rank=3, alpha=3), LORA),
    sites=2,
    trainable=3 * (7 + 4) + 2 * (4 + 4),  # one adapter for the table, one for w
)
def tied_embedding(dtype):
    """Lookup and output head from one leaf: one adapter, consistent in both."""
    return Problem(
        lambda p, ids: jnp.tanh(p["table"][ids] @ p["w"]) @ p["table"].T,
        normals(dtype, table=(7, 4), w=(4, 4)),
        (jnp.array(IDS),),
    )


@case(subject="lookup", rules=(LoRA("table", rank=2, alpha=4),), sites=1, trainable=2 * (7 + 4))
def tied_embedding_head_first(dtype):
    """The table is used as a head before it is used for a lookup."""

    def apply(p, x):
        ids = jnp.argmax(jnp.array(IDS)[..., None] == jnp.arange(7)[None, None], axis=-1)
        return jnp.einsum("bd,vd->bv", x, p["table"]), p["table"][ids]

    return Problem(apply, normals(dtype, table=(7, 4)), (normal("x", (3, 4), dtype),))


@case(subject="lookup", rules=(LORA,), sites=1, trainable=2 * (4 + 4))
def tied_embedding_not_named(dtype):
    """All-linear leaves a table alone, also a tied one."""
    return tied_embedding.build(dtype)


@case(subject="lookup", rules=(LORA,), sites=2, trainable=2 * (4 + 6) + 3 * 2 * (6 + 5))
def weights_multiplied_with_one_repeated(dtype):
    """The same, of one leaf that is repeated and one that is a stack."""

    def apply(p, x):
        w = jnp.broadcast_to(p["w"], (3, 4, 6))
        return jnp.einsum("ti,nij->ntj", x, jnp.einsum("nio,noj->nij", w, p["v"]))

    return Problem(apply, normals(dtype, w=(4, 6), v=(3, 6, 5)), (normal("x", (2, 4), dtype),))


# --------------------------------------------------------------------------------------------
# Convolutions with layouts that Flax does not use. (See linen.py for the others.)
# --------------------------------------------------------------------------------------------


@case(subject="convolution", rules=(LORA,), sites=1, trainable=2 * (3 * 2 * 3 + 4))
def conv_nchw(dtype):
    """PyTorch's layouts: NCHW and OIHW."""
    return Problem(
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
        ),
        normals(dtype, w=(4, 3, 3, 2)),
        (normal("x", (2, 3, 5, 6), dtype),),
    )


@case(subject="convolution", rules=(LORA,), sites=1, trainable=2 * (3 * 2 + 6), exact_at_zero=False)
def conv_transposed_kernel(dtype):
    """A kernel stored (out, in / groups, width), turned around before a grouped convolution."""
    return Problem(
        lambda p, x: lax.conv_general_dilated(
            x,
            jnp.transpose(p["w"], (2, 1, 0)),
            (2,),
            [(1, 2)],
            rhs_dilation=(2,),
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=2,
        ),
        normals(dtype, w=(6, 2, 3)),
        (normal("x", (2, 7, 4), dtype),),
    )


@case(subject="convolution", rules=(LORA,), sites=2, trainable=2 * (3 * 4 + 5) + 2 * (1 * 5 + 4))
def conv_used_twice(dtype):
    """One kernel over two inputs, one of them under vmap, then a kernel of width 1."""

    def conv(x, w):
        return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    def apply(p, x):
        each = jax.vmap(lambda one: conv(one[None], p["w"])[0])(jnp.sin(x))
        return conv(jnp.tanh(conv(x, p["w"]) + each), p["v"])

    return Problem(
        apply, normals(dtype, w=(3, 4, 5), v=(1, 5, 4)), (normal("x", (2, 6, 4), dtype),)
    )


# --------------------------------------------------------------------------------------------
# Fused kernels.
# --------------------------------------------------------------------------------------------


def attend(q, k, v):
    """Attention of one head."""
    scores = jnp.einsum("...qd,...kd->...qk", q, k) / math.sqrt(q.shape[-1])
    return jax.nn.softmax(scores, axis=-1) @ v


def fused_by_concatenation(dtype):
    """Three leaves are concatenated, multiplied once, and the product is split."""

    def apply(p, x):
        kernel = jnp.concatenate([p["q"], p["k"], p["v"]], axis=-1)
        bias = jnp.concatenate([p["qb"], p["kb"], p["vb"]])
        return attend(*jnp.split(x @ kernel + bias[None], 3, axis=-1))

    shapes = {"q": (6, 4), "k": (6, 4), "v": (6, 4), "qb": (4,), "kb": (4,), "vb": (4,)}
    return Problem(apply, normals(dtype, **shapes), (normal("x", (3, 6), dtype),))


def fused_by_stacking(dtype):
    """Three leaves become one of shape (d, 3, h, k)."""

    def apply(p, x):
        kernel = jnp.stack([p["q"], p["k"], p["v"]], axis=1)
        out = jnp.einsum("sd,dnhk->nhsk", x, kernel)
        return attend(out[0], out[1], out[2])

    shapes = dict.fromkeys("qkv", (6, 2, 4))
    return Problem(apply, normals(dtype, **shapes), (normal("x", (3, 6), dtype),))


for suffix, pattern, n in ("all", "^[qkv]$", 3), ("two", "^[qv]$", 2), ("one", "^k$", 1):
    CASES += [
        Case(
            name=f"concatenate_adapted_{suffix}",
            subject="slots",
            build=fused_by_concatenation,
            rules=(LoRA(pattern, rank=2, alpha=4),),
            sites=n,
            trainable=n * 2 * (6 + 4),
            exact_at_zero=False,
        ),
        Case(
            name=f"stack_adapted_{suffix}",
            subject="slots",
            build=fused_by_stacking,
            rules=(LoRA(pattern, rank=2, alpha=4),),
            sites=n,
            trainable=n * 2 * (6 + 2 * 4),
            exact_at_zero=False,
        ),
    ]


def fused_kernel(dtype):
    """One kernel (d, 3·d); the product is split."""

    def apply(p, x):
        return attend(*jnp.split(x @ p["w"] + p["b"][None], 3, axis=-1))

    return Problem(apply, normals(dtype, w=(6, 12), b=(12,)), (normal("x", (3, 6), dtype),))


def fused_kernel_split_before(dtype):
    """One kernel (d, 3·d), split before the products."""

    def apply(p, x):
        return attend(*(x @ w for w in jnp.split(p["w"], 3, axis=-1)))

    return Problem(apply, normals(dtype, w=(6, 12)), (normal("x", (3, 6), dtype),))


def fused_kernel_transposed(dtype):
    """One kernel stored (3·d, d): the output axis is the first."""

    def apply(p, x):
        return attend(*jnp.split(x @ p["w"].T, 3, axis=-1))

    return Problem(apply, normals(dtype, w=(12, 6)), (normal("x", (3, 6), dtype),))


def fused_kernel_reshaped(dtype):
    """One kernel (d, 3·d), reshaped to (d, 3, h, k) before the product."""

    def apply(p, x):
        out = jnp.einsum("sd,dnhk->nhsk", x, p["w"].reshape(6, 3, 2, 2))
        return attend(out[0], out[1], out[2])

    return Problem(apply, normals(dtype, w=(6, 12)), (normal("x", (3, 6), dtype),))


def fused_kernel_heads(dtype):
    """One kernel (d, h, 3·k): the slots are those of the last output axis, in every head."""

    def apply(p, x):
        out = jnp.einsum("sd,dhk->hsk", x, p["w"])
        return attend(*jnp.split(out, 3, axis=-1))

    return Problem(apply, normals(dtype, w=(6, 2, 12)), (normal("x", (3, 6), dtype),))


def fused_kernel_of_axes(dtype):
    """One kernel (d, 3, h, k): the slots are an axis of their own."""

    def apply(p, x):
        out = jnp.einsum("sd,dnhk->nhsk", x, p["w"])
        return attend(out[0], out[1], out[2])

    return Problem(apply, normals(dtype, w=(6, 3, 2, 2)), (normal("x", (3, 6), dtype),))


# Builder, outputs of one slot, which of the output axes is fused.
FUSED = {
    "slots_split_after": (fused_kernel, 4, 0),
    "slots_split_before": (fused_kernel_split_before, 4, 0),
    "slots_transposed": (fused_kernel_transposed, 4, 0),
    "slots_reshaped": (fused_kernel_reshaped, 4, 0),
    "slots_heads": (fused_kernel_heads, 2 * 4, 1),
    "slots_of_axes": (fused_kernel_of_axes, 1 * 2 * 2, 0),
}
for fused_name, (fused_build, width, axis) in FUSED.items():
    CASES.append(
        Case(
            name=fused_name,
            subject="slots",
            build=fused_build,
            rules=(LoRA("^w$", rank=2, alpha=4, slots=Slots(3, (0, 2), axis)),),
            sites=1,
            trainable=2 * 2 * (6 + width),  # two slots, rank 2
            exact_at_zero=False,
        )
    )


@case(
    subject="slots",
    rules=(LoRA("w", rank=3, alpha=3, slots=Slots(3, (1,))),),
    sites=1,
    trainable=1 * 3 * (6 + 4),
    exact_at_zero=False,
)
def slots_one_in_the_middle(dtype):
    """Only the middle slot is adapted."""
    return fused_kernel(dtype)


@case(
    subject="slots",
    rules=(LoRA("^w$", rank=2, alpha=4, slots=Slots(2, (0, 1))), LORA),
    sites=2,
    trainable=2 * 2 * (6 + 4) + 2 * (4 + 6),  # gate and up, down
    exact_at_zero=False,
)
def slots_gate_and_up(dtype):
    """A gated MLP with gate and up in one kernel, both slots adapted, and a plain down."""

    def apply(p, x):
        gate, up = jnp.split(x @ p["w"], 2, axis=-1)
        return (jax.nn.silu(gate) * up) @ p["down"]

    return Problem(apply, normals(dtype, w=(6, 8), down=(4, 6)), (normal("x", (3, 6), dtype),))


@case(
    subject="slots",
    rules=(LoRA("w", rank=2, alpha=4, slots=Slots(3, (0, 2))),),
    sites=1,
    trainable=2 * 2 * 2 * (5 + 5),  # two layers, two slots
    exact_at_zero=False,
)
def slots_scanned(dtype):
    """A scanned stack of fused kernels: (layers, d, 3·d)."""

    def layer(x, w):
        return x + attend(*jnp.split(x @ w, 3, axis=-1)), None

    return Problem(
        lambda p, x: lax.scan(layer, x, p["w"])[0],
        normals(dtype, w=(2, 5, 15)),
        (normal("x", (3, 5), dtype),),
    )


# --------------------------------------------------------------------------------------------
# Mixtures of experts. w: (3 experts, 6, 5).
# --------------------------------------------------------------------------------------------

EXPERTS = {"subject": "experts", "rules": (LORA,), "sites": 1, "trainable": 3 * 2 * (6 + 5)}


@case(**EXPERTS)
def experts_einsum(dtype):
    """Experts are a batch axis of the product."""
    return Problem(
        lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["w"]),
        normals(dtype, w=(3, 6, 5)),
        (normal("x", (3, 4, 6), dtype),),
    )


@case(**EXPERTS)
def experts_einsum_last(dtype):
    """Experts are a batch axis, the last one in the leaf: (6, 5, experts)."""
    return Problem(
        lambda p, x: jnp.einsum("dfe,ced->cef", p["w"], x),
        normals(dtype, w=(6, 5, 3)),
        (normal("x", (4, 3, 6), dtype),),
    )


@case(**EXPERTS | {"trainable": 2 * (6 + 3 * 5)})
def experts_vmap_shared_input(dtype):
    """Every expert sees every token: one product, in which experts are output axes as any other."""
    return Problem(
        lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]),
        normals(dtype, w=(3, 6, 5)),
        (normal("x", (3, 4, 6), dtype),),
    )


@case(**EXPERTS, vmap=False, twice=False)
def experts_ragged_dot(dtype):
    """Tokens sorted by expert: ragged_dot."""
    return Problem(
        lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes),
        normals(dtype, w=(3, 6, 5)),
        (normal("x", (7, 6), dtype), jnp.array([2, 0, 5], jnp.int32)),
    )


@case(
    subject="experts",
    rules=(LORA,),
    sites=2,
    trainable=3 * 2 * (6 + 5) + 3 * 2 * (5 + 6),
    vmap=False,
    twice=False,
)
def experts_ragged_mlp(dtype):
    """Routing, sort, two ragged products, unsort: the usual dropless layer."""

    def apply(p, x):
        gates = jax.nn.softmax(x[:, :3], axis=-1)
        expert = jnp.argmax(gates, axis=-1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=3).astype(jnp.int32)
        h = jax.nn.gelu(lax.ragged_dot(x[order], p["up"], sizes))
        out = lax.ragged_dot(h, p["down"], sizes)[jnp.argsort(order)]
        return out * jnp.max(gates, axis=-1, keepdims=True)

    return Problem(
        apply, normals(dtype, up=(3, 6, 5), down=(3, 5, 6)), (normal("x", (7, 6), dtype),)
    )


@case(**EXPERTS)
def experts_gathered(dtype):
    """The weight of every token's expert is gathered by index: w[expert]."""
    return Problem(
        lambda p, x, expert: jnp.einsum("ti,tio->to", x, p["w"][expert]),
        normals(dtype, w=(3, 6, 5)),
        (normal("x", (4, 6), dtype), jnp.array([2, 0, 2, 1])),
    )


@case(**EXPERTS)
def experts_gathered_top_two(dtype):
    """Two experts for every token, gathered by take."""
    return Problem(
        lambda p, x, expert: jnp.einsum("ti,tkio->tko", x, jnp.take(p["w"], expert, axis=0)),
        normals(dtype, w=(3, 6, 5)),
        (normal("x", (2, 6), dtype), jnp.array([[2, 0], [1, 2]])),
    )


@case(
    subject="experts",
    rules=(LORA,),
    sites=3,
    # The router; up with its experts as outputs, as d is all it contracts; down per expert.
    trainable=2 * (6 + 3) + 2 * (6 + 3 * 5) + 3 * 2 * (5 + 6),
)
def experts_dense_mixture(dtype):
    """A soft mixture: every token through every expert, weighted by a router."""

    def apply(p, x):
        gates = jax.nn.softmax(x @ p["router"], axis=-1)
        h = jax.nn.gelu(jnp.einsum("td,edf->tef", x, p["up"]))
        return jnp.einsum("te,ted->td", gates, jnp.einsum("tef,efd->ted", h, p["down"]))

    shapes = {"router": (6, 3), "up": (3, 6, 5), "down": (3, 5, 6)}
    return Problem(apply, normals(dtype, **shapes), (normal("x", (4, 6), dtype),))


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


@case(subject="call", rules=(LORA,), sites=2, trainable=2 * (6 + 6) + 2 * (6 + 5))
def output_tree(dtype):
    """Nested pytrees, a dataclass, None and integers come out as they are."""

    def apply(p, x):
        h = jnp.tanh(x @ p["w"])
        logits = h @ p["v"]
        extra = {"argmax": jnp.argmax(x, axis=-1), "none": None, "list": [h, (logits,)]}
        return Output(logits=logits, hidden=(x, h), cache=None), extra

    return Problem(apply, normals(dtype, w=(6, 6), v=(6, 5)), (normal("x", (3, 6), dtype),))


@case(subject="call", rules=(LORA,), sites=1, trainable=2 * (6 + 5), jit=False)
def python_if_on_a_value(dtype):
    """Python control flow on the value of an argument."""

    def apply(p, x, n):
        if x.sum() > 0:
            x = -x
        for _ in range(int(n)):
            x = jnp.tanh(x)
        return x @ p["w"] if float(x[0, 0]) < 10 else x[:, :5]

    return Problem(apply, normals(dtype, w=(6, 5)), (normal("x", (3, 6), dtype), jnp.array(2)))


@case(subject="call", rules=(LORA,), sites=1, trainable=2 * (6 + 5), jit=False)
def python_flags(dtype):
    """Flags, strings, None and functions as positional and keyword arguments."""

    def apply(p, x, train, mode, *, activation, mask=None, scale=1.0):
        if train is not True or mode != "double" or mask is not None:
            raise ValueError("the arguments changed on their way")
        return activation(x @ p["w"]) * scale

    return Problem(
        apply,
        normals(dtype, w=(6, 5)),
        (normal("x", (3, 6), dtype), True, "double"),
        {"activation": jnp.tanh, "mask": None, "scale": 2.0},
    )


@case(subject="call", rules=(LORA,), sites=1, trainable=2 * (6 + 5))
def keyword_arguments(dtype):
    """Arrays by keyword, in a nested container."""
    return Problem(
        lambda p, *, batch, shift: batch["x"] @ p["w"] + shift[0],
        normals(dtype, w=(6, 5)),
        (),
        {
            "batch": {"x": normal("x", (3, 6), dtype), "unused": None},
            "shift": [normal("shift", (3, 5), dtype)],
        },
    )


@case(subject="call", rules=(LORA,), sites=1, trainable=2 * (6 + 5))
def debug_print(dtype):
    """`jax.debug.print` of an activation, outside and inside of jit."""
    helper = jax.jit(lambda h: (jax.debug.print("mean {}", h.mean()), jnp.tanh(h))[1])

    def apply(p, x):
        h = x @ p["w"]
        jax.debug.print("norm {norm}", norm=jnp.linalg.norm(h))
        return helper(h)

    return Problem(apply, normals(dtype, w=(6, 5)), (normal("x", (3, 6), dtype),))


@case(
    subject="call",
    rules=(LoRA("^w$", rank=2, alpha=4), Full("^b$|^v$")),
    sites=1,
    trainable=2 * (6 + 5) + 5 + 5 * 4,
)
def trained_in_full(dtype):
    """A bias and a head trained in full beside a low-rank site."""
    return Problem(
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"],
        normals(dtype, w=(6, 5), b=(5,), v=(5, 4)),
        (normal("x", (3, 6), dtype),),
    )


# --------------------------------------------------------------------------------------------
# What is no site. In each, w is the only one.
# --------------------------------------------------------------------------------------------

ONLY_W = {"subject": "no_site", "rules": (LORA,), "sites": 1}


@case(**ONLY_W, trainable=2 * (5 + 5))
def activation_of_the_weights_shape(dtype):
    """Activations, and a product of two of them, have the shape of the weight."""

    def apply(p, x):
        h = jnp.tanh(x @ p["w"])
        return h @ x + x @ h.T

    return Problem(apply, normals(dtype, w=(5, 5)), (normal("x", (5, 5), dtype),))


@case(**ONLY_W, trainable=2 * (6 + 5))
def added_positions(dtype):
    """A positional embedding is added to the input: whole, and a slice of it."""

    def apply(p, x):
        return (x + p["position"][None, :3]) @ p["w"] + p["shift"]

    shapes = {"w": (6, 5), "position": (8, 6), "shift": (2, 3, 5)}
    return Problem(apply, normals(dtype, **shapes), (normal("x", (2, 3, 6), dtype),))


@case(**ONLY_W, trainable=2 * (6 + 5))
def learned_query(dtype):
    """A leaf that enters only through a nonlinearity is an activation from there on."""
    return Problem(
        lambda p, x: x @ p["w"] @ jnp.tanh(p["gate"]),
        normals(dtype, w=(6, 5), gate=(5, 4)),
        (normal("x", (3, 6), dtype),),
    )


@case(**ONLY_W, trainable=2 * (6 + 5))
def class_token(dtype):
    """A class token is broadcast and concatenated to the tokens."""

    def apply(p, x):
        token = jnp.broadcast_to(p["token"], (2, 1, 6))
        return jnp.concatenate([token, x], axis=1) @ p["w"]

    return Problem(
        apply, normals(dtype, w=(6, 5), token=(1, 1, 6)), (normal("x", (2, 3, 6), dtype),)
    )


@case(**ONLY_W, trainable=2 * (6 + 5))
def returned_and_measured(dtype):
    """A leaf that is returned, one that is only summed, and one that is not used."""
    return Problem(
        lambda p, x: (x @ p["w"], p["returned"], jnp.sum(p["summed"] ** 2)),
        normals(dtype, w=(6, 5), returned=(4, 4), summed=(4, 4), unused=(4, 4)),
        (normal("x", (3, 6), dtype),),
    )


@case(**ONLY_W, trainable=2 * (6 + 5))
def looked_up_positions(dtype):
    """Lookups of tokens and positions are embeddings: all-linear leaves them alone."""
    return Problem(
        lambda p, ids: (p["token"][ids] + p["position"][jnp.arange(3)][None]) @ p["w"],
        normals(dtype, w=(6, 5), token=(7, 6), position=(8, 6)),
        (jnp.array(IDS),),
    )


# --------------------------------------------------------------------------------------------
# Ways of writing it that other libraries have.
# --------------------------------------------------------------------------------------------


@case(
    subject="convolution",
    rules=(LORA,),
    sites=1,
    trainable=2 * (3 * 3 + 4 * 2),
    exact_at_zero=False,
)
def depthwise_kernel_of_multipliers(dtype):
    """Keras keeps (k, k, channels, multiplier), and reshapes: A by the window, B by the rest."""

    def apply(p, x):
        kernel = p["k"].reshape(3, 3, 1, 4 * 2)
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=4
        )

    return Problem(apply, normals(dtype, k=(3, 3, 4, 2)), (normal("x", (2, 5, 5, 4), dtype),))


@case(subject="convolution", rules=(LORA,), sites=1, trainable=2 * (3 * 3 * 4 + 6))
def convolution_of_grouped_batches(dtype):
    """`batch_group_count`: each half of the batch has half of the outputs."""

    def apply(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, p["k"], (1, 1), "SAME", dimension_numbers=numbers, batch_group_count=2
        )

    return Problem(apply, normals(dtype, k=(3, 3, 4, 6)), (normal("x", (4, 5, 5, 4), dtype),))


@case(subject="lookup", rules=(LoRA("table", rank=2, alpha=4),), sites=1, trainable=2 * (7 + 4))
def row_looked_up_under_vmap(dtype):
    """As `eqx.nn.Embedding` has it: one row, mapped over the indices."""
    table = normals(dtype, table=(7, 4))
    return Problem(lambda p, i: jax.vmap(lambda i: p["table"][i])(i), table, (jnp.array(IDS),))


@case(subject="lookup", rules=(LoRA("table", rank=2, alpha=4),), sites=1, trainable=2 * (7 + 4))
def tied_row_under_vmap(dtype):
    """The same, and the table is the head too."""

    def apply(p, i):
        h = jax.vmap(lambda i: p["table"][i])(i)
        return jnp.tanh(h) @ p["table"].T

    return Problem(apply, normals(dtype, table=(7, 4)), (jnp.array(IDS),))


@case(subject="experts", rules=(LORA,), sites=1, trainable=3 * 2 * (4 + 5), exact_at_zero=False)
def experts_looked_up_under_vmap(dtype):
    """One matrix of a stack for each token."""
    return Problem(
        lambda p, i, x: jax.vmap(lambda i, x: x @ p["w"][i])(i, x),
        normals(dtype, w=(3, 4, 5)),
        (jnp.array([1, 2, 0, 0]), normal("x", (4, 4), dtype)),
    )


@case(subject="experts", rules=(LORA,), sites=1, trainable=3 * 2 * (4 + 5), exact_at_zero=False)
def stack_repeated_along_itself(dtype):
    """`jnp.repeat` over the axis of a stack."""
    return Problem(
        lambda p, x: jnp.einsum("bln,lnm->blm", x, jnp.repeat(p["w"], 2, axis=0)),
        normals(dtype, w=(3, 4, 5)),
        (normal("x", (2, 6, 4), dtype),),
    )


@case(subject="product", rules=(LORA,), sites=1, trainable=2 * (6 + 5), exact_at_zero=False)
def one_column(dtype):
    """A matrix of which the model uses one column at a time."""
    return Problem(
        lambda p, x: [x @ p["w"][:, 0], x @ p["w"][:, 3]],
        normals(dtype, w=(6, 5)),
        (normal("x", (3, 6), dtype),),
    )


@case(
    subject="experts",
    rules=(LoRA("u", rank=2, alpha=4, dtype=jnp.float32), LoRA("v", rank=2, alpha=4)),
    sites=2,
    trainable=2 * 2 * (4 + 4),
    exact_at_zero=False,
)
def stacked_with_factors_of_two_dtypes(dtype):
    """Leaves joined to a stack, whose A and B differ in dtype."""

    def apply(p, x):
        weights = jnp.stack([p["u"], p["v"]])
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0]

    return Problem(apply, normals(dtype, u=(4, 4), v=(4, 4)), (normal("x", (3, 4), dtype),))


@case(subject="call", rules=(LORA,), sites=1, trainable=2 * (16 + 16), exact_at_zero=False)
def adapted_twice(dtype):
    """An adapted apply is adapted again: with many tokens too."""
    inner = jlora.transform(lambda p, x: x @ p["w"], LORA)
    params, x = normals(dtype, w=(16, 16)), normal("x", (64, 16), dtype)
    base, adapter = inner.init(jax.random.key(0), params, x)
    adapter = jax.tree.map(lambda v: v + jnp.asarray(0.1, v.dtype), adapter)
    return Problem(lambda p, x: inner.apply(p, adapter, x), base, (x,))


def along_one() -> None:
    """Adds lookups along an axis of length 1, and places that are counted from the end."""
    twice = jnp.array([0, 0])
    shapes = {
        "row_of_one": ((1, 4), (2, 4), lambda w, x: x + w[twice], (1, 4)),
        "row_of_one_taken": ((1, 4), (2, 4), lambda w, x: x + jnp.take(w, twice, axis=0), (1, 4)),
        "row_of_one_tied": ((1, 4), (2, 4), lambda w, x: (x + w[twice]) @ w.T, (1, 4)),
        "matrix_of_one": ((1, 3, 4), (2, 3), lambda w, x: x @ w[twice], (3, 4)),
        "matrix_of_one_by_token": (
            (1, 4, 2),
            (2, 4),
            lambda w, x: jnp.einsum("bi,bio->bo", x, w[twice]),
            (4, 2),
        ),
        "row_of_two_indices": ((3, 1, 4), (2, 4), lambda w, x: x + w[twice, twice], (3, 4)),
        "place_before_the_first": ((3, 2, 4), (3, 2), lambda w, x: x @ w[jnp.int32(-5)], None),
        "slice_before_the_first": (
            (3, 4),
            (3, 2),
            lambda w, x: x @ lax.dynamic_slice_in_dim(w, jnp.int32(-4), 2, 0),
            (3, 4),
        ),
    }
    for name, (*problem, sides) in shapes.items():
        of_one_leaf(
            name,
            *problem,
            subject="lookup",
            rules=(LoRA("w", rank=1, alpha=2),),
            trainable=3 * (2 + 4) if sides is None else sum(sides),
            exact_at_zero=False,
        )


along_one()


@case(
    subject="product",
    rules=(LoRA(".*", rank=1),),
    sites=2,
    trainable=2 * (3 + 4),
    exact_at_zero=False,
)
def two_weights_meet_along_a_new_axis(dtype):
    """Each is repeated along a batch axis, which neither A nor B has."""

    def apply(p, x):
        return jax.vmap(lambda u, v: x @ (u @ v))(p["u"][None], p["v"][None])

    return Problem(apply, normals(dtype, u=(3, 4), v=(4, 3)), (normal("x", (2, 3), dtype),))
