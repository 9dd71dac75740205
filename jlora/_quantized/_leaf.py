"""The quantized leaf of a base, and how it is dequantized."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from .. import _compat
from .._arrays import automatically, back, explicit, to_device
from .._core import Axis, Factor, Packed, place_of_part
from .._types import NotAnArray, PyTree
from .._types import short as short_name
from ._dynamic import dequantize_scales
from ._scheme import Form, Scheme, spell, spread, unpack

OTHER = Axis(-3)  # an axis that follows no axis of W: a flat matrix, or groups of scales


class Nested(NamedTuple):
    """Scales of scales, if the scales are codes of 8 bits themselves (double quantization).

    Attributes:
        scale: the scale of each group of 256 scales, in the order of files; float32 of shape
            (stack…, groups).
        offset: the number that is added to all scales; float32 of shape (stack…).
    """

    scale: Any
    offset: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized(NotAnArray):
    r"""A weight of a base in 4 or 8 bits: codes, and a scale for each block of them.

    It is a pytree node with the children `data`, `scale`, `zero`, `nested` and `error`; the other
    fields are static. jlora treats it as one leaf with the shape and dtype of the weight, and
    dequantizes it next to each use. It is not an array: call functions of a tree with such leaves
    through `lora.apply` or `jlora.wrap`.

    Attributes:
        data: the codes, with W's axes. A byte has two codes of 4 bits, packed along the axis of the
            blocks: entry j of a block in the high bits, entry j + block / 2 in the low bits.
        scale: the scale of each block, with W's axes except those that one block covers.
        zero: a second number for each block, such as the zero point of Int4, or None.
        nested: the scales of the scales if these are codes of 8 bits, else None.
        error: $\lVert W - Q \rVert / \lVert W \rVert$ of each matrix, with Q the dequantized W;
            float32 of shape (stack…). None if W was not known.
        scheme: the scheme.
        form: how W is divided into blocks.
        dtype: the dtype of the weight.
        used: the sharding in which the model uses the weight, or None. The codes are resharded to
            it before they are dequantized. See `jlora.sharding.gathered`.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> scheme = jlora.NF4("w", block=64, double=False)
        >>> w = jlora.quantize({"w": jnp.ones((128, 3), jnp.bfloat16)}, scheme)["w"]
        >>> w.shape, w.data.shape, w.scale.shape, w.nbytes
        ((128, 3), (64, 3), (2, 3), 216)
    """

    data: Any
    scale: Any
    zero: Any
    nested: Any
    error: Any
    scheme: Scheme = dataclasses.field(metadata={"static": True})
    form: Form = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    used: Any = dataclasses.field(default=None, metadata={"static": True})

    _remedy: ClassVar = (
        "a weight is a jlora.Quantized. Only lora.apply and functions under jlora.wrap accept it: "
        "call lora.apply(base, adapter, ...), with {} as the adapter for the base model, or "
        "jlora.wrap(model.apply)(params, ...). jlora.dequantize(params) returns plain arrays."
    )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.form.shape

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries of the weight."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of codes and scales; `error` is not counted."""
        parts = jax.tree.leaves((self.data, self.scale, self.zero, self.nested))
        return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in parts)

    def map_arrays(self, f: Callable[[Any, Sequence[int | None]], Any]) -> "Quantized":
        """Replaces each array x by `f(x, axes)`; the axes of x follow the axes `axes` of W.

        None in `axes` is an axis that follows no axis of W.
        """
        stack, scaled = self.form.stack, self.form.scaled
        axes = {"data": self.form.coded, "scale": scaled, "zero": scaled, "error": stack}
        arrays = {name: getattr(self, name) for name in axes}
        new: dict[str, Any] = {n: f(x, axes[n]) for n, x in arrays.items() if x is not None}
        if self.nested is not None:
            scale, offset = self.nested
            new["nested"] = Nested(f(scale, (*stack, None)), f(offset, stack))
        return dataclasses.replace(self, **new)

    def packed(self, axes: Sequence[Axis], dtype: DTypeLike | None = None) -> Packed:
        """Makes W for the interpreter, with the axes `axes`; by default in its own dtype."""
        self._check_dtypes()
        axes = tuple(axes)
        dtype = jnp.dtype(self.dtype if dtype is None else dtype)
        parts = dataclasses.replace(self, error=None).map_arrays(
            lambda x, dims: Factor(x, tuple(OTHER if d is None else axes[d] for d in dims))
        )
        unpack = _partial(_unpack, axes, dtype)
        plain = None if self.nested is None else _partial(_with_plain_scales, axes)
        return Packed(parts, unpack, axes, self.shape, dtype, self._splittable(axes), plain)

    def _splittable(self, axes: Sequence[Axis]) -> frozenset[Axis]:
        """Finds the axes along which splitting codes and scales splits W, if scales are numbers."""
        form = self.form
        if form.flat:
            return frozenset(axes[d] for d in form.stack)
        lengths = zip(axes, form.shape, form.blocks, strict=True)
        splittable = {a for a, n, block in lengths if n % block == 0 or block > n}
        if self.scheme.bits == 4 and form.is_whole(form.axis):  # a byte has codes of both halves
            splittable.remove(axes[form.axis])
        return frozenset(splittable)

    def _check_dtypes(self) -> None:
        """Raises if the arrays were cast, for example by a map over all arrays of a tree."""
        legal = self.scheme.scales if self.nested is None else ("uint8",)
        nested = () if self.nested is None else self.nested
        if str(self.scale.dtype) in legal and all(str(x.dtype) == "float32" for x in nested):
            return
        found = ", ".join(str(x.dtype) for x in (self.scale, *nested))
        raise TypeError(
            f"a quantized weight has scales of {found}; {spell(self.scheme)} needs "
            f"{' or '.join(legal)}{', float32, float32' if nested else ''}. Was the whole tree "
            "cast? Cast only the other leaves: "
            "jax.tree.map(lambda x: x if isinstance(x, jlora.Quantized) else "
            "x.astype(dtype), params, is_leaf=lambda x: isinstance(x, jlora.Quantized))."
        )

    def array(self, dtype: DTypeLike | None = None) -> jax.Array:
        """Dequantizes the weight."""
        axes = [Axis(d) for d in range(self.ndim)]
        return self.packed(axes, dtype).array

    def __repr__(self) -> str:
        what = jax.ShapeDtypeStruct(self.shape, self.dtype)
        return f"Quantized({short_name(what)}, {spell(self.scheme)})"


BaseLeaf = jax.Array | jax.ShapeDtypeStruct | Quantized  # a leaf of a base, or only its type


def is_quantized(x: object) -> TypeGuard[Quantized]:
    """Whether `x` is a quantized leaf."""
    return isinstance(x, Quantized)


def dequantize(tree: PyTree, dtype: DTypeLike | None = None) -> PyTree:
    """Turns each `Quantized` leaf of a tree into a plain array.

    Args:
        tree: any tree.
        dtype: the dtype of these arrays; by default each weight has its own.

    Returns:
        A tree like the one given to `quantize`. Values are computed in float32 and rounded once.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> base = jlora.quantize({"w": jnp.ones((64, 2), jnp.bfloat16)}, jlora.Int8("w"))
        >>> jlora.dequantize(base)["w"].dtype.name
        'bfloat16'
    """

    def plain(x: object) -> Any:
        if not is_quantized(x):
            return x
        is_abstract = isinstance(x.data, jax.ShapeDtypeStruct)
        return jax.eval_shape(lambda x: x.array(dtype), x) if is_abstract else _array(x, dtype)

    return jax.tree.map(plain, tree, is_leaf=is_quantized)


@functools.partial(jax.jit, static_argnums=1)
def _array(x: Quantized, dtype: DTypeLike | None) -> jax.Array:
    return back(to_device(x).array(dtype), x)


# ------------------------------------------------------------------------------------- from codes


# One object for equal arguments, so that weights of one form have equal functions.
_partial = functools.lru_cache(4096)(functools.partial)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="in_turn")
def _unpack(
    axes: tuple[Axis, ...], dtype: jnp.dtype, parts: Quantized, in_turn: Axis | None = None
) -> Factor:
    """Unpacks W with the axes `axes`, or a piece of it if its arrays were split or sliced.

    With `in_turn`, TPUs unpack the entries along this axis one after another.
    """
    used = parts.used
    # In a shard_map of the model, the arrays are shards.
    if used is not None and not jax.sharding.get_abstract_mesh().manual_axes:
        shard = lambda x, f: lax.with_sharding_constraint(x, place_of_part(f, used, axes))  # noqa: E731
        parts = parts.map_arrays(lambda f, _: f.each(lambda x: shard(x, f)))
    parts = _with_plain_scales(axes, parts)
    decode = functools.partial(_decode, axes, dtype)
    if in_turn is None:
        return decode(parts)
    loop = functools.partial(_decode_in_turn, decode, in_turn)
    return lax.platform_dependent(parts, tpu=loop, default=decode)


def _decode_in_turn(decode: Callable[[Quantized], Factor], axis: Axis, parts: Quantized) -> Factor:
    """Decodes the entries along `axis` in a loop.

    A TPU's core has room for one entry on its way from codes to the layout that a product needs,
    where XLA would write all entries to main memory for each step of that way.
    """
    whole = jax.eval_shape(decode, parts)
    arrays = jax.tree.leaves(parts)

    def step(i: jax.Array, w: jax.Array) -> jax.Array:
        one = {axis: lambda x, d: lax.dynamic_slice_in_dim(x, i, 1, d)}
        entry = decode(parts.map_arrays(lambda f, _: f.along(one)))
        return lax.dynamic_update_slice_in_dim(w, entry.value, i, whole.axis(axis))

    # All of it is overwritten. A constant would be shared by loops, and written for each.
    start = jnp.broadcast_to(arrays[0].ravel()[0].astype(whole.dtype), whole.shape)
    w = lax.fori_loop(0, whole.length(axis), step, _compat.vary_with(start, arrays))
    return whole.replace(w)


def _decode(axes: tuple[Axis, ...], dtype: jnp.dtype, parts: Quantized) -> Factor:
    """Computes W from codes and scales that are numbers."""
    form, data, zero = parts.form, parts.data, parts.zero
    axis = OTHER if form.flat else axes[form.axis]
    block = form.blocks[form.axis]
    of_axis = {axis: block} if form.flat else dict(zip(axes, form.blocks, strict=True))
    blocks = [of_axis.get(a, 1) for a in data.axes]
    codes = data.value
    if parts.scheme.bits == 4:
        codes = unpack(codes, data.axis(axis), block)

    def each(f: Factor) -> jax.Array:
        return spread(f.expand_to(data.axes), blocks, codes.shape)

    value = parts.scheme.decode(codes, each(parts.scale), zero and each(zero)).astype(dtype)
    if not form.flat:
        return Factor(value, data.axes)
    lead = [a for a in data.axes if a != OTHER]
    value = Factor(value, data.axes).expand_to([*lead, OTHER])[..., : math.prod(form.matrix)]
    value = value.reshape(*value.shape[:-1], *form.matrix)
    return Factor(value, (*lead, *(axes[d] for d in form.order)))


def _with_plain_scales(axes: tuple[Axis, ...], parts: Quantized) -> Quantized:
    """Computes the scales if they are codes."""
    if parts.nested is None:
        return parts
    form, codes, nested = parts.form, parts.scale, parts.nested
    inner = [OTHER] if form.flat else [axes[d] for d in form.order if d in form.scaled]
    lead = [a for a in codes.axes if a not in inner]
    x = codes.expand_to([*lead, *inner])

    def plain(x: jax.Array, *nested: jax.Array) -> jax.Array:
        flat = x.reshape(*x.shape[: len(lead)], math.prod(x.shape[len(lead) :]))
        return dequantize_scales(flat, *nested).reshape(x.shape)

    # Groups run across shards.
    place = explicit(x)
    compute = automatically(plain, place)
    scale = compute(x, nested.scale.expand_to([*lead, OTHER]), nested.offset.expand_to(lead))
    scale = codes.replace(scale, [*lead, *inner])
    return dataclasses.replace(parts, scale=scale, nested=None)
