"""Quantized bases: what is refused, and what is said of it."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from messages import all_refused, refused
from small import KEY, array, swap

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


# ------------------------------------------------------------------------------- fields of schemes

LEGAL = [(NF4, "block"), (FP4, "block"), (Int8, "block"), (Int4, "group"), (FP8, "block")]


@pytest.mark.parametrize("value", [0, -64, 48, 8192, 64.0, "64", True, (64,)], ids=repr)
@pytest.mark.parametrize(("scheme", "field"), LEGAL)
def test_block(scheme: Any, field: str, value: Any) -> None:
    """Neither another number nor what is none; None where blocks may be left out."""
    with refused(ValueError, field, scheme.__name__, f"got {value!r}"):
        scheme("w", **{field: value})
    is_optional = scheme in (Int8, FP8)
    given = refused(ValueError, field, scheme.__name__, "got None")
    with contextlib.nullcontext() if is_optional else given:
        assert scheme(**{field: None}).block is None
    assert getattr(scheme(**{field: np.int64(64)}), field) == 64


def test_a_scheme_lacks_the_field_of_its_legal_blocks() -> None:
    """A scheme of a user may define `legal`, but neither `block` nor `group`."""

    @dataclasses.dataclass(frozen=True)
    class Own(jlora.extend.Scheme):
        bits = 8
        legal = (32, 64)

    with refused(ValueError, "block", "Own('w')", "got None"):
        Own("w")


# ---------------------------------------------------------------------------------------- quantize

HEADLESS = swap(PARAMS, "head", None)
BROKEN = array(64, 96).at[2, :3].set(np.array([np.nan, np.inf, -np.inf]))
REFUSED: dict[type[Exception], dict[str, Any]] = {
    TypeError: {
        "`double` ... NF4('w') ... got 1": lambda: NF4("w", double=1),
        "`double` ... FP4('w') ... got None": lambda: FP4("w", double=None),
        "`pattern` ... NF4 ... got 3 of type int": lambda: NF4(3),
        "`schemes` ... got 'kernel'": lambda: quantize("kernel"),
        "`schemes` ... got None": quantize,
        "`schemes` ... got Full(": lambda: quantize(NF4("kernel"), Full("odd")),
        "`schemes` ... the class NF4 ... NF4(...)": lambda: quantize(NF4),
        "`params` ... got an adapter": lambda: quantize(NF4(), params=adapted()[1]),
    },
    ValueError: {
        "`pattern` ... '[' ... at position 0": lambda: NF4("["),
        "`params` ... NF4('kernal') ... layer/kernel": lambda: quantize(NF4("kernal")),
        "`params` ... NF4('w') ... no leaf": lambda: quantize(NF4("w"), params={}),
        "NF4('kernel$|head') ... Int8('kernel|head') ... reorder or narrow": lambda: quantize(
            Int8("kernel|head"), NF4("kernel$|head")
        ),
        "NF4() ... no pattern ... sites=lora.sites(": lambda: quantize(NF4()),
        "`sites` ... no site for NF4() ... by a pattern": lambda: quantize(
            Int8("kernel"), NF4(), sites=True
        ),
        "`sites` ... head ... `params` ... of the same tree": lambda: quantize(
            NF4("kernel"), params=HEADLESS, sites=True
        ),
        "`sites` ... arm ... `params` ... of the same tree": lambda: quantize(
            NF4("kernel"), params={**PARAMS, "arm": array(64, 64)}, sites=True
        ),
        "'bucket' ... int32 ... Narrow": lambda: quantize(FP8("bucket")),
        "'odd' ... Full('odd') ... Give NF4 a": lambda: quantize(NF4("odd|kernel"), sites=True),
        "'layer/bias' ... of shape (96,) ... Narrow the": lambda: quantize(NF4("kernel|bias")),
        "'w' ... of shape (0, 64) ... Narrow the pattern": lambda: quantize(
            MXFP4("w"), params={"w": jnp.ones((0, 64))}
        ),
        "'the root' ... of shape (64,) ... Narrow the": lambda: quantize(NF4(""), params=array(64)),
        "'layer/kernel' ... as Int8(block=32) ... jlora.dequantize(params)": lambda: quantize(
            NF4("kernel"), params=quantize(Int8("kernel", block=32))
        ),
        "`group` ... 'odd' ... got 128 ... 16, 32": lambda: quantize(Int4("odd")),
        "`block` ... 'w' ... got 128 ... Give one of 16, 32, 64": lambda: quantize(
            Int8("w", block=128), params=STACK
        ),
        "`block` ... 'head' ... of length 40 ... leave it out of": lambda: quantize(MXFP4("head")),
        "`params` ... 'layer/kernel' ... 3 values ... Use a checkpoint": lambda: quantize(
            Int8("kernel"), params=swap(PARAMS, "layer/kernel", BROKEN)
        ),
    },
}


# What cannot be quantized, or would not be.
test_quantize = all_refused(REFUSED)


def test_refused_before_anything_is_deleted() -> None:
    """A mistake in the second scheme costs no weight of the first."""
    params = jax.tree.map(jnp.copy, PARAMS)
    with refused(ValueError, "", "'layer/bias'", "is not a matrix"):
        quantize(NF4("kernel"), Int8("bias"), params=params, donate=True)
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))


# ------------------------------------------------------------------------------ what takes a base


def test_a_scan_and_methods_of_arrays():
    leaf = jlora.quantize({"w": array(2, 96, 64)}, jlora.NF4("w"))["w"]
    methods = (lambda: leaf.astype(jnp.bfloat16), lambda: leaf.reshape(-1))
    scan = lambda: jax.lax.scan(lambda x, w: (x @ w, None), array(2, 96), leaf)  # noqa: E731
    for method in (scan, *methods):
        with refused(TypeError, "", "jlora.Quantized", "jlora.dequantize(params)"):
            method()


@pytest.mark.parametrize(
    ("scheme", "got", "needs"),
    [(NF4("w"), "uint8, bfloat16, bfloat16", "uint8, float32, float32"),
     (Int8("w"), "bfloat16", "float32 or float16")],
    ids=["NF4", "Int8"],
)  # fmt: skip
def test_a_tree_that_was_cast(scheme: Any, got: str, needs: str) -> None:
    """Scales of fewer bits would be other values, and nothing would say so."""

    def cast(x: jax.Array) -> jax.Array:
        return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x

    base = jax.tree.map(cast, jlora.quantize({"w": array(128, 128)}, scheme))
    for call in (jlora.wrap(lambda p: array(2, 128) @ p["w"]), jlora.dequantize):
        with refused(TypeError, "", f"scales of {got};", f"needs {needs}", "Cast only the other"):
            call(base)


@functools.cache
def adapted() -> tuple[Any, Any]:
    """A base of which a weight that is adapted is quantized, and an adapter."""
    return jlora.transform(model, LoRA("kernel", rank=2)).init(
        KEY, quantize(NF4("kernel"), Int8("head")), IDS
    )


def with_codes(adapter: Any) -> Any:
    """An adapter whose A is quantized."""
    node = adapter["layer"]["kernel"]
    a = jlora.quantize({"a": node.a}, Int8("a"))["a"]
    return swap(adapter, "layer/kernel", node.replace(a=a))


SPEC = P(None, "tensor")
GATHERED = {"embed": P(), "layer": {"bias": P()}}
TAKERS: dict[type[Exception], dict[str, Any]] = {
    ValueError: {
        "'layer/kernel' ... is quantized ... narrow the pattern of Full": lambda: jlora.transform(
            model, Full("kernel")
        ).init(KEY, adapted()[0], IDS),
        "`unmerge` ... 'layer/kernel' ... is quantized ... Keep": lambda: jlora.unmerge(*adapted()),
        "`specs` ... head, layer/kernel ... lacks 2 quantized ... Give": lambda: sharding.gathered(
            adapted()[0], GATHERED
        ),
        f"{SPEC} ... tensor ... jax.set_mesh(mesh)": lambda: jlora.wrap(lambda p: p["w"] @ p["w"])(
            sharding.gathered(quantize(NF4("w"), params={"w": array(64, 64)}), {"w": SPEC})
        ),
    },
    TypeError: {
        "`merged` ... head, layer/kernel ... Give jlora.dequantize(merged)": lambda: (
            checkpoint.export("/nowhere/merged", adapted()[0])
        ),
        "`adapter` ... layer/kernel/a: Quantized": lambda: checkpoint.save(
            "/nowhere/adapter", with_codes(adapted()[1]), LORA.rules
        ),
    },
}


# Where its values cannot be what is asked for.
test_a_base_is_refused = all_refused(TAKERS)


# ----------------------------------------------------------------------------------------- meshes


def places(scheme: Any, spec: P, *shape: int) -> Any:
    """`specs` of one quantized weight."""
    base = jlora.quantize({"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, scheme)
    return sharding.specs({"w": spec}, base, MESH)


COLUMNS = P(None, "tensor")
# A scheme, a sharding and a shape; what it does not fit, and what would.
MISFITS: dict[str, Any] = {
    "groups": (Int4("w"), P("tensor"), (256, 64), "each device 64", "blocks of 16, 32, 64"),
    "blocks": (
        *(Int8("w", block=64), P(None, ("fsdp", "tensor")), (3, 256, 64)),
        *("each device 32", "blocks of 16, 32 would"),
    ),
    "no block": (NF4("w", block=32), P("tensor"), (160, 64), "each device 40", "none would fit"),
    "rows": (NF4("w"), COLUMNS, (40, 64), "axis 1 of length 64", "a block that divides"),
    "rows of a stack": (
        *(FP4("w"), P(None, "fsdp"), (3, 40, 64)),
        *("axis 1 of length 40", "a block that divides"),
    ),
    "length": (NF4("w"), P("tensor"), (126, 64), "axis 0 of length 126 ", "tensor=4"),
    "no axis": (NF4("w"), P("data"), (128, 64), "no axis 'data'", "fsdp, tensor"),
    "too long": (NF4("w"), P(None, None, "fsdp"), (128, 64), "3 entries", "shape (128, 64)"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_partition(case: str) -> None:
    """Where a device would get a part of a block."""
    scheme, spec, shape, got, remedy = MISFITS[case]
    with refused(ValueError, "base", "w", got, remedy):
        places(scheme, spec, *shape)


def test_partitions_that_fit() -> None:
    """Stacks of flat weights, and axes of which each output has all inputs in one block."""
    flat = places(NF4("w"), P("fsdp"), 2, 40, 64)["w"]
    assert (flat.data.spec, flat.scale.spec) == (P("fsdp", None), P("fsdp", None))
    whole = places(Int8("w"), P("tensor", "fsdp"), 40, 64)["w"]
    assert (whole.data.spec, whole.scale.spec) == (P("tensor", "fsdp"), P("fsdp"))
