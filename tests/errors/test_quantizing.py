"""Quantized bases: what is refused, and what is said of it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from small import KEY, NO_ARRAY, array, each_refusal, exactly, swap

import jlora
from jlora import FP4, FP8, MXFP4, NF4, Full, Int4, Int8, LoRA, checkpoint, sharding

IDS = jnp.arange(4)
PARAMS = {
    "embed": array(96, 64),
    "layer": {"kernel": array(64, 96), "bias": array(96)},
    "odd": array(96, 40),
    "head": array(40, 96),
    "bucket": jnp.ones((64, 64), jnp.int32),
}
STACK = {"w": array(3, 64, 64)}
MESH = AbstractMesh((2, 4), ("fsdp", "tensor"))


def model(p: Any, ids: jax.Array) -> jax.Array:
    """An embedding, two products, and a head of which each output is a row of the embedding."""
    x = p["embed"][ids]
    return jnp.tanh(x @ p["layer"]["kernel"] + p["layer"]["bias"]) @ p["odd"] @ p["head"]


LORA = jlora.transform(model, LoRA("kernel", rank=2), Full("odd"))


def quantize(*schemes: Any, params: Any = PARAMS, sites: bool = False, **kwargs: Any) -> Any:
    """`jlora.quantize`, with or without the sites of the model."""
    found = LORA.sites(PARAMS, IDS) if sites else None
    return jlora.quantize(params, *schemes, sites=found, **kwargs)


def refused(error: type[Exception], message: str) -> Any:
    """Expects an error that says `message` and nothing else."""
    return pytest.raises(error, match=exactly(message))


# ------------------------------------------------------------------------------- fields of schemes

TABLES = "32, 64, 128, 256, 512, 1024, 2048, 4096"
ROWS = "16, 32, 64, 128, 256, 512, 1024"
LEGAL = [
    (NF4, "block", TABLES),
    (FP4, "block", TABLES),
    (Int8, "block", ROWS),
    (Int4, "group", ROWS),
    (FP8, "block", "32, 64, 128, 256, 512"),
]


@pytest.mark.parametrize("value", [0, -64, 48, 8192, 64.0, "64", True, (64,)], ids=repr)
@pytest.mark.parametrize(("scheme", "field", "legal"), LEGAL)
def test_block(scheme: Any, field: str, legal: str, value: Any) -> None:
    """Neither another number nor what is none; None where blocks may be left out."""
    message = f"`{field}` of {scheme.__name__}('w') must be one of {legal}; got {value!r}."
    with refused(ValueError, message):
        scheme("w", **{field: value})
    optional = scheme in (Int8, FP8)
    message = f"`{field}` of {scheme.__name__}() must be one of {legal}; got None."
    with contextlib.nullcontext() if optional else refused(ValueError, message):
        assert scheme(**{field: None}).block is None
    assert getattr(scheme(**{field: np.int64(64)}), field) == 64


def test_a_scheme_lacks_the_field_of_its_legal_blocks() -> None:
    """A scheme of a user may define `legal`, but neither `block` nor `group`."""

    @dataclasses.dataclass(frozen=True)
    class Own(jlora.extend.Scheme):
        bits = 8
        legal = (32, 64)

    with refused(ValueError, "`block` of Own('w') must be one of 32, 64; got None."):
        Own("w")


# ---------------------------------------------------------------------------------------- quantize

SCHEMES = (
    "`schemes` must be jlora.NF4, jlora.FP4, jlora.Int8, jlora.Int4, jlora.FP8 or jlora.MXFP4; got "
)
REFUSED: dict[type[Exception], dict[str, Any]] = {
    TypeError: {
        "`double` of NF4('w') must be True or False; got 1.": lambda: NF4("w", double=1),
        "`double` of FP4('w') must be True or False; got None.": lambda: FP4("w", double=None),
        "`pattern` of NF4 must be a regular expression as a string; got 3 of type int.": (
            lambda: NF4(3)
        ),
        f"{SCHEMES}'kernel'.": lambda: quantize("kernel"),
        f"{SCHEMES}Full(pattern='odd').": lambda: quantize(NF4("kernel"), Full("odd")),
        f"{SCHEMES}the class NF4; call it, NF4(...).": lambda: quantize(NF4),
    },
    ValueError: {
        "`pattern` '[' is not a regular expression: unterminated character set at position 0.": (
            lambda: NF4("[")
        ),
        "NF4('kernal') matches no leaf of `params`. Near misses: layer/kernel, head, layer/bias.": (
            lambda: quantize(NF4("kernal"))
        ),
        "NF4('w') matches no leaf of `params`. There is no leaf to match.": lambda: quantize(
            NF4("w"), params={}
        ),
        "NF4('kernel$|head') gets no leaf: earlier schemes match all 2 leaves that it matches "
        "(Int8('kernel|head')). The "
        "first match wins; reorder the schemes or drop this one.": lambda: quantize(
            Int8("kernel|head"), NF4("kernel$|head")
        ),
        "NF4() has no pattern, so it matches every dense site except the head. Give "
        "`sites=lora.sites(params, ...)`, which lists the dense sites, or a pattern.": lambda: (
            quantize(NF4())
        ),
        "NF4() matches every dense site except the head and leaves trained in full, but `sites` "
        "has no such site. Name leaves by a pattern.": (
            lambda: quantize(Int8("kernel"), NF4(), sites=True)
        ),
        "`sites` does not belong to `params`: only one of them has head. Give "
        "lora.sites(params, ...) of the same tree.": lambda: quantize(
            NF4("kernel"), params=swap(PARAMS, "head", None), sites=True
        ),
        "FP8('bucket') matches 'bucket' of dtype int32, which is not floating-point. Narrow the "
        "pattern.": lambda: quantize(FP8("bucket")),
        "`sites` does not belong to `params`: only one of them has arm. Give "
        "lora.sites(params, ...) of the same tree.": lambda: quantize(
            NF4("kernel"), params={**PARAMS, "arm": array(64, 64)}, sites=True
        ),
        "NF4('odd|kernel') matches 'odd', which Full('odd') trains in full: trained leaves must "
        "not be quantized. Give NF4 a pattern that leaves it out.": lambda: quantize(
            NF4("odd|kernel"), sites=True
        ),
        "NF4('kernel|bias') matches 'layer/bias' of shape (96,), which is not a matrix. Narrow the "
        "pattern.": lambda: quantize(NF4("kernel|bias")),
        "MXFP4('w') matches 'w' of shape (0, 64), which is not a matrix. Narrow the pattern.": (
            lambda: quantize(MXFP4("w"), params={"w": jnp.ones((0, 64))})
        ),
        "NF4('') matches 'the root' of shape (64,), which is not a matrix. Narrow the pattern.": (
            lambda: quantize(NF4(""), params=array(64))
        ),
        "NF4('kernel') matches 'layer/kernel', which is quantized already, as Int8(block=32). "
        "Narrow the pattern, or give jlora.dequantize(params).": lambda: quantize(
            NF4("kernel"), params=quantize(Int8("kernel", block=32))
        ),
        "Int4('odd') matches 'odd'. `group` of Int4('odd') must divide axis 0, of length 96, of a "
        "weight of shape (96, 40); got 128. Give one of 16, 32.": lambda: quantize(Int4("odd")),
        "Int8('w') matches 'w'. `block` of Int8('w') must divide axis 1, of length 64, of a weight "
        "of shape (3, 64, 64); got 128. Give one of 16, 32, 64.": lambda: quantize(
            Int8("w", block=128), params=STACK
        ),
        "MXFP4('head') matches 'head'. `block` of MXFP4('head') must divide axis 0, of length 40, "
        "of a weight of shape (40, 96); got 32. None does: leave it out of the pattern.": lambda: (
            quantize(MXFP4("head"))
        ),
        "'layer/kernel' of `params` has 3 values that are NaN or infinite, for which Int8 has no "
        "codes. Use a checkpoint whose values are finite.": lambda: quantize(
            Int8("kernel"),
            params=swap(
                PARAMS,
                "layer/kernel",
                array(64, 96).at[2, :3].set(np.array([np.nan, np.inf, -np.inf])),
            ),
        ),
    },
}


@each_refusal(REFUSED)
def test_quantize(provoke: Callable[[], Any], error: type[Exception], message: str) -> None:
    """What cannot be quantized, or would not be."""
    with refused(error, message):
        provoke()


def test_refused_before_anything_is_deleted() -> None:
    """A mistake in the second scheme costs no weight of the first."""
    params = jax.tree.map(jnp.copy, PARAMS)
    with pytest.raises(ValueError, match="is not a matrix"):
        quantize(NF4("kernel"), Int8("bias"), params=params, donate=True)
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))


# ------------------------------------------------------------------------------ what takes a base


def test_a_scan_and_methods_of_arrays():
    leaf = jlora.quantize({"w": array(2, 96, 64)}, jlora.NF4("w"))["w"]
    with refused(TypeError, NO_ARRAY):
        jax.lax.scan(lambda x, w: (x @ w, None), array(2, 96), leaf)
    for method in (lambda: leaf.astype(jnp.bfloat16), lambda: leaf.reshape(-1)):
        with refused(TypeError, NO_ARRAY):
            method()


CAST = (
    "a quantized weight has scales of {0}; {1} needs {2}. Was the whole tree cast? Cast only the "
    "other leaves: "
    "jax.tree.map(lambda x: x if isinstance(x, jlora.Quantized) else x.astype(dtype), "
    "params, is_leaf=lambda x: isinstance(x, jlora.Quantized))."
)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (
            NF4("w"),
            ("uint8, bfloat16, bfloat16", "NF4(block=64, double=True)", "uint8, float32, float32"),
        ),
        (Int8("w"), ("bfloat16", "Int8(block=None)", "float32 or float16")),
    ],
)
def test_a_tree_that_was_cast(scheme: Any, words: tuple[str, ...]) -> None:
    """Scales of fewer bits would be other values, and nothing would say so."""

    def cast(x: jax.Array) -> jax.Array:
        return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x

    base = jax.tree.map(cast, jlora.quantize({"w": array(128, 128)}, scheme))
    with refused(TypeError, CAST.format(*words)):
        jlora.wrap(lambda p: array(2, 128) @ p["w"])(base)
    with refused(TypeError, CAST.format(*words)):
        jlora.dequantize(base)


@functools.cache
def adapted() -> tuple[Any, Any]:
    """A base of which a weight that is adapted is quantized, and an adapter."""
    return jlora.transform(model, LoRA("kernel", rank=2)).init(
        KEY, quantize(NF4("kernel"), Int8("head")), IDS
    )


SPEC = P(None, "tensor")
TAKERS: dict[type[Exception], dict[str, Any]] = {
    ValueError: {
        "Full('kernel') matches 'layer/kernel', which is quantized: trained leaves must not be "
        "quantized. Give NF4 a pattern that leaves it out, or narrow the pattern of Full.": (
            lambda: jlora.transform(model, Full("kernel")).init(KEY, adapted()[0], IDS)
        ),
        "`unmerge` cannot subtract ΔW at 'layer/kernel', which is quantized: its codes hold the "
        "sum only roughly. Keep the base.": lambda: jlora.unmerge(*adapted()),
        "`specs` of gathered lacks 2 quantized weights of `base`: head, layer/kernel. Give the "
        "sharding of each.": lambda: sharding.gathered(
            adapted()[0], {"embed": P(), "layer": {"bias": P()}}
        ),
        f"{SPEC} names the mesh axes tensor, which no mesh in scope has. Give a NamedSharding, or "
        "call the function under jax.set_mesh(mesh).": lambda: jlora.wrap(
            lambda p: p["w"] @ p["w"]
        )(sharding.gathered(quantize(NF4("w"), params={"w": array(64, 64)}), {"w": SPEC})),
    },
    TypeError: {
        "`merged` must have plain arrays; got quantized leaves at head, layer/kernel. Give "
        "jlora.dequantize(merged), or merge without requantize=True.": lambda: checkpoint.export(
            "/nowhere/merged", adapted()[0]
        ),
    },
}


@each_refusal(TAKERS)
def test_a_base_is_refused(provoke: Callable[[], Any], error: Any, message: str) -> None:
    """Where its values cannot be what is asked for."""
    with refused(error, message):
        provoke()


# ----------------------------------------------------------------------------------------- meshes


def places(scheme: Any, spec: P, *shape: int) -> Any:
    """`specs` of one quantized weight."""
    base = jlora.quantize({"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, scheme)
    return sharding.specs({"w": spec}, base, MESH)


MISFITS = {
    "axis 0 of length 256 over tensor=4 gives each device 64, which is not a multiple of the "
    "block 128 of Int4(group=128); blocks of 16, 32, 64 would fit": lambda: places(
        Int4("w"), P("tensor"), 256, 64
    ),
    "axis 1 of length 256 over fsdp=2 × tensor=4 gives each device 32, which is not a multiple of "
    "the block 64 of Int8(block=64); blocks of 16, 32 would fit": lambda: places(
        Int8("w", block=64), P(None, ("fsdp", "tensor")), 3, 256, 64
    ),
    "axis 0 of length 160 over tensor=4 gives each device 40, which is not a multiple of the "
    "block 32 of NF4(block=32, double=True); none would fit": lambda: places(
        NF4("w", block=32), P("tensor"), 160, 64
    ),
    "axis 1 of length 64 is divided over tensor=4, but blocks of NF4(block=64, double=True) "
    "cross the ends of its rows; quantize it with a block that divides its inputs": lambda: places(
        NF4("w"), P(None, "tensor"), 40, 64
    ),
    "axis 1 of length 40 is divided over fsdp=2, but blocks of FP4(block=64, double=False) cross "
    "the ends of its rows; quantize it with a block that divides its inputs": lambda: places(
        FP4("w"), P(None, "fsdp"), 3, 40, 64
    ),
    "axis 0 of length 126 cannot be divided over tensor=4": lambda: places(
        NF4("w"), P("tensor"), 126, 64
    ),
    "the mesh has no axis 'data'; it has fsdp, tensor": lambda: places(
        NF4("w"), P("data"), 128, 64
    ),
    f"{P(None, None, 'fsdp')} has 3 entries for a weight of shape (128, 64)": lambda: places(
        NF4("w"), P(None, None, "fsdp"), 128, 64
    ),
}


@each_refusal({ValueError: MISFITS})
def test_partition(provoke: Callable[[], Any], error: Any, message: str) -> None:
    """Where a device would get a part of a block."""
    whole = (
        "`base` has shardings that do not fit at 1 of 1 paths of `adapter`:\n"
        f"  w: {message}\nCorrect them in `base`: the adapter follows W."
    )
    with refused(error, whole):
        provoke()


def test_partitions_that_fit() -> None:
    """Stacks of flat weights, and axes of which each output has all inputs in one block."""
    flat = places(NF4("w"), P("fsdp"), 2, 40, 64)["w"]
    assert (flat.data.spec, flat.scale.spec) == (P("fsdp", None), P("fsdp", None))
    whole = places(Int8("w"), P("tensor", "fsdp"), 40, 64)["w"]
    assert (whole.data.spec, whole.scale.spec) == (P("tensor", "fsdp"), P("fsdp"))
