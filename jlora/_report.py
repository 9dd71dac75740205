"""A report of the parameters and bytes of a base and its adapter."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._adapters import is_node, trained
from ._compat import evaluate_now
from ._quantized import Quantized, Scheme, is_quantized, spell
from ._text import align_columns, format_bytes
from ._tree import check_base, count, leaves_by_path, name_of, refuse_module, size_in_bytes
from ._types import Path, PyTree


class QuantizedLeaf(NamedTuple):
    r"""One quantized leaf in a `Summary`.

    Attributes:
        path: its path.
        shape: the shape of the weight.
        scheme: the scheme of its codes.
        before: bytes of the weight in its own dtype.
        after: bytes of the codes and scales.
        error: $\lVert W - Q \rVert / \lVert W \rVert$ with Q the dequantized weight; the largest of
            a stack. None if the leaf was read from a file or has no values.
    """

    path: Path
    shape: tuple[int, ...]
    scheme: Scheme
    before: int
    after: int
    error: float | None


class Summary(NamedTuple):
    """Parameters and bytes of a base and its adapter; `str()` is a table.

    Attributes:
        base: number of parameters of the base.
        trainable: number of parameters of the adapter that are trained.
        base_bytes: bytes of the base.
        trainable_bytes: bytes of these parameters.
        quantized: a `QuantizedLeaf` for each quantized leaf of the base.
    """

    base: int
    trainable: int
    base_bytes: int
    trainable_bytes: int
    quantized: tuple[QuantizedLeaf, ...] = ()

    @property
    def share(self) -> float:
        """Trainable parameters ÷ parameters of the base."""
        return self.trainable / max(self.base, 1)

    def __str__(self) -> str:
        sizes = [("base (frozen)", self.base, self.base_bytes)]
        if self.trainable:
            sizes += [
                ("adapter (trainable)", self.trainable, self.trainable_bytes),
                ("Adam moments", 2 * self.trainable, 2 * self.trainable_bytes),
            ]
        rows = [(name, f"{n:,}", format_bytes(size)) for name, n, size in sizes]
        lines = align_columns(("", "parameters", "size"), rows, {"parameters", "size"})
        if self.trainable:
            lines.append(f"trainable share {100 * self.share:.3g}%")
        if self.quantized:
            lines += ["", *self._table_of_quantized()]
        return "\n".join(lines)

    def _table_of_quantized(self) -> list[str]:
        header = ("path", "shape", "scheme", "bits", "before", "after", "error")
        rows = [
            (
                name_of(leaf.path),
                "×".join(map(str, leaf.shape)),
                spell(leaf.scheme),
                f"{8 * leaf.after / max(1, math.prod(leaf.shape)):.3f}",
                format_bytes(leaf.before),
                format_bytes(leaf.after),
                "-" if leaf.error is None else f"{leaf.error:.3g}",
            )
            for leaf in self.quantized
        ]
        saved = sum(leaf.before - leaf.after for leaf in self.quantized)
        rest = self.base_bytes - sum(leaf.after for leaf in self.quantized)
        return [
            *align_columns(header, rows, {"bits", "before", "after", "error"}),
            f"{format_bytes(self.base_bytes + saved)} before, {format_bytes(self.base_bytes)} "
            f"after, of which {format_bytes(rest)} are not quantized",
        ]


def summary(base: PyTree, adapter: PyTree = None) -> Summary:
    r"""Counts the parameters and bytes of a base and its adapter.

    It also lists each quantized leaf of the base, with its bits per parameter and its error.

    Args:
        base: the frozen tree, of arrays or `jax.ShapeDtypeStruct`s.
        adapter: the trainable tree, of the same; None if there is no adapter yet.

    Returns:
        A `Summary`, which `print` shows as a table.

    Raises:
        TypeError: if `base` is an adapter, which `jlora.count` counts alone, or has one in it; if
            one of them is a module with an adapter, from `jlora.nnx` or `jlora.keras`.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=2))
        >>> params, x = {"w": jnp.ones((64, 64))}, jnp.ones((1, 64))
        >>> print(jlora.summary(*lora.init(jax.random.key(0), params, x)))
                             parameters      size
        base (frozen)             4,096  16.0 KiB
        adapter (trainable)         256   1.0 KiB
        Adam moments                512   2.0 KiB
        trainable share 6.25%
        >>> params = {"w": jax.random.normal(jax.random.key(0), (256, 256)), "b": jnp.ones(256)}
        >>> found = jlora.summary(jlora.quantize(params, jlora.NF4("w")))
        >>> print(str(found).partition("\n\n")[2])
        path  shape    scheme                       bits     before     after  error
        w     256×256  NF4(block=64, double=True)  4.127  256.0 KiB  33.0 KiB  0.092
        257.0 KiB before, 34.0 KiB after, of which 1.0 KiB are not quantized
    """
    check_base(base)
    refuse_module(adapter, "adapter")
    leaves = [(path, x) for path, x in leaves_by_path(base) if is_quantized(x)]
    own = jax.tree.map(lambda x: trained(x) if is_node(x) else x, adapter, is_leaf=is_node)
    return Summary(
        count(base),
        count(own),
        size_in_bytes(base),
        size_in_bytes(own),
        tuple(_quantized_leaf(path, x) for path, x in leaves),
    )


def _quantized_leaf(path: Path, x: Quantized) -> QuantizedLeaf:
    before = x.size * jnp.dtype(x.dtype).itemsize
    error = None if x.error is None else evaluate_now(jnp.max, x.error)
    error = None if error is None else float(error)
    return QuantizedLeaf(path, tuple(x.shape), x.scheme, before, x.nbytes, error)
