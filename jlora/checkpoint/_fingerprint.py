"""Fingerprints of a base: paths, shapes, dtypes, schemes and, optionally, hashes of the values."""

import dataclasses
import functools
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._arrays import AnyArray, abstract
from .._errors import Problem
from .._quantized import Quantized, is_quantized, spell
from .._tree import is_abstract, leaves_by_path, name_of, nest
from .._types import Path, PyTree

SEEDS = (0x9E3779B9, 0x85EBCA6B)


class Leaf(NamedTuple):
    """One leaf in a fingerprint.

    Attributes:
        shape: its shape.
        dtype: the name of its dtype in JAX.
        hash: 64 bits, in hexadecimal, that depend on every bit of its values; or None.
        scheme: how it is quantized, such as `"NF4(block=64, double=True)"`; "" if it is not; None
            if the checkpoint does not say.
    """

    shape: tuple[int, ...]
    dtype: str
    hash: str | None = None
    scheme: str | None = None


Fingerprint = dict[Path, Leaf]
KEYS = ("threefry2x32", "rbg", "unsafe_rbg")  # JAX's implementations


def is_fingerprint(x: object) -> TypeGuard[Fingerprint]:
    """Whether `x` is a fingerprint."""
    return isinstance(x, dict) and bool(x) and all(isinstance(leaf, Leaf) for leaf in x.values())


def shapes_of(found: Fingerprint) -> PyTree:
    """Returns the base as a tree of `jax.ShapeDtypeStruct`s."""
    return nest({path: struct_of(x) for path, x in found.items()})


def struct_of(leaf: Leaf) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of a leaf; raises for a dtype that JAX does not have."""
    is_key = leaf.dtype.startswith("key<")
    return jax.ShapeDtypeStruct(leaf.shape, _key_dtypes().get(leaf.dtype) if is_key else leaf.dtype)


@functools.cache
def _key_dtypes() -> dict[str, Any]:
    kinds = (jax.random.key(0, impl=name).dtype for name in KEYS)
    return {str(x): x for x in kinds}


def fingerprint(base: PyTree, values: bool = False) -> Fingerprint:
    """Returns paths, shapes, dtypes and schemes of a tree and, with `values`, hashes of its values.

    A hash is the same on every mesh and number of processes: each device mixes its values with
    their positions, and the results are added modulo 2³². It detects mix-ups and damage, but it is
    not a cryptographic hash. A quantized weight has the shape and dtype of the dense weight, and
    its scheme.

    Args:
        base: a tree of arrays or, without `values`, of `jax.ShapeDtypeStruct`s.
        values: whether to hash the values. All values are then read once.

    Returns:
        A dict from path to `Leaf`.

    Raises:
        TypeError: if `values` is True, and a leaf is a `jax.ShapeDtypeStruct`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jlora import checkpoint
        >>> checkpoint.fingerprint({"layer": {"kernel": jnp.ones((4, 3))}})
        {('layer', 'kernel'): Leaf(shape=(4, 3), dtype='float32', hash=None, scheme='')}
    """
    leaves = [
        (path, x if hasattr(x, "dtype") else np.asarray(x)) for path, x in leaves_by_path(base)
    ]
    bare = [name_of(path) for path, x in leaves if any(map(is_abstract, jax.tree.leaves(x)))]
    if values and bare:
        raise TypeError(
            "`base` must be a tree of arrays to hash their values; got jax.ShapeDtypeStruct at "
            f"{', '.join(bare)}. Give the arrays, or values=False."
        )
    narrow = _narrow if values else abstract
    return {path: leaf_of(x if is_quantized(x) else narrow(x), values) for path, x in leaves}


def _narrow(x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Converts an array to its dtype in JAX, which may have 32 bits instead of 64."""
    dtype = abstract(x).dtype
    return x if x.dtype == dtype else np.asarray(x).astype(dtype)


def leaf_of(x: AnyArray | Quantized, values: bool) -> Leaf:
    """Returns the leaf of an array with its own dtype, even if JAX would narrow it."""
    scheme = spell(x.scheme) if is_quantized(x) else ""
    return Leaf(tuple(x.shape), str(x.dtype), hash_of(x) if values else None, scheme)


def hash_of(x: AnyArray | Quantized) -> str:
    """Returns 64 bits that depend on every bit of an array, however it is sharded.

    For a quantized weight they depend on every bit of its codes and scales.
    """
    if is_quantized(x):
        parts = enumerate(jax.tree.leaves(dataclasses.replace(x, error=None)), 1)
        return f"{sum(i * int(hash_of(part), 16) for i, part in parts) % 2**64:016x}"
    with jax.enable_x64(True):  # otherwise NumPy's float64 would be narrowed first
        return "".join(f"{int(n):08x}" for n in _sums(jnp.asarray(x)))


@jax.jit
def _sums(x: jax.Array) -> tuple[jax.Array, ...]:
    words = _words(x)
    return tuple(jnp.sum(_mix(_places(words.shape, s) ^ words), dtype=jnp.uint32) for s in SEEDS)


def _words(x: jax.Array) -> jax.Array:
    """Returns the bits of an array as uint32; elements above 32 bits add an axis."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = min(jax.dtypes.itemsize_bits(x.dtype), 32)
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _places(shape: tuple[int, ...], seed: int) -> jax.Array:
    """Returns a number for each position, from its index along every axis."""
    places = jnp.full(shape, seed, jnp.uint32)
    for d in range(len(shape)):
        places = _mix(places ^ lax.broadcasted_iota(jnp.uint32, shape, d))
    return places


def _mix(x: jax.Array) -> jax.Array:
    """Permutes 32-bit integers, so that every bit of the result depends on every bit of `x`."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x ^ (x >> jnp.uint32(16))


def differences(expected: Fingerprint, got: Fingerprint, any_width: bool = False) -> list[Problem]:
    """Finds the paths at which `got` differs from `expected`.

    With `any_width`, dtypes of 64 and of 32 bits count as equal. The values of such a leaf may have
    been rounded, and are not compared.
    """
    wrong = [Problem(name_of(p), "missing") for p in expected if p not in got]
    wrong += [Problem(name_of(p), "unexpected") for p in got if p not in expected]
    for path in expected.keys() & got.keys():
        a, b = expected[path], got[path]
        if any_width and a.dtype != b.dtype and _narrowed(a.dtype) == _narrowed(b.dtype):
            b = b._replace(dtype=a.dtype, hash=None)
        for name, x, y in zip(Leaf._fields, a, b, strict=True):
            if x != y and None not in (x, y):  # a hash or a scheme that is not known
                x, y = ("none" if value == "" else value for value in (x, y))
                wrong.append(Problem(name_of(path), f"expected {name} {x}, got {y}"))
    return sorted(wrong)


def _narrowed(dtype: str) -> str:
    """Returns the name of a dtype in a session without x64."""
    wide = {"int64": "int32", "uint64": "uint32", "float64": "float32", "complex128": "complex64"}
    return wide.get(dtype, dtype)
