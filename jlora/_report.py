"""Tables of text, and a report of the parameters and bytes of a base and its adapter."""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._adapters import is_node, trained
from ._compat import evaluate_now
from ._quantized import Quantized, Scheme, is_quantized, spell
from ._tree import count, leaves_by_path, name_of, refuse_module, size_in_bytes
from ._types import Path, PyTree


def align_columns(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str]
) -> list[str]:
    """Aligns the header and the rows as lines, with the columns named in `right` flush right.

    >>> align_columns(("name", "n"), [("a", "1"), ("b", "10")], {"n"})
    ['name   n', 'a      1', 'b     10']
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(w) if name in right else cell.ljust(w)
            for cell, w, name in zip(row, widths, header, strict=True)
        ).rstrip()
        for row in (header, *rows)
    ]


def fold_numbers(
    paths: Sequence[str], rows: Sequence[tuple[str, ...]]
) -> list[tuple[str, list[int]]]:
    """Folds three or more paths that have equal rows and differ in one number, which counts up.

    Returns each path with the indices of its rows.

    >>> fold_numbers(["h/0/w", "h/1/w", "h/2/w", "h/3/w"], [("8",), ("8",), ("8",), ("4",)])
    [('h/0…2/w', [0, 1, 2]), ('h/3/w', [3])]
    """
    found = [(re.split(r"(\d{1,9})", path), [n]) for n, path in enumerate(paths)]
    for i in range(1, max((len(parts) for parts, _ in found), default=0), 2):  # where numbers are

        def rest(x: tuple[list[str], list[int]], i: int = i) -> tuple[Any, ...]:
            return rows[x[1][0]], x[0][:i], x[0][i + 1 :]

        def number(x: tuple[list[str], list[int]], i: int = i) -> int:
            return int(x[0][i]) if len(x[0]) > i else 0

        found.sort(key=lambda x: (rest(x), number(x)))
        runs = defaultdict(list)
        for n, x in enumerate(found):
            runs[str(rest(x)), number(x) - n].append(x)
        found = []
        for run in runs.values():
            (parts, _), (end, _) = run[0], run[-1]
            folded = [*parts[:i], f"{parts[i]}…{end[i]}", *parts[i + 1 :]] if len(run) > 2 else None
            found += [(folded, [n for _, ns in run for n in ns])] if folded else run
    return [("".join(parts), ns) for parts, ns in sorted(found, key=lambda x: x[1][0])]


def format_bytes(n: float) -> str:
    """Writes a number of bytes.

    >>> format_bytes(1536)
    '1.5 KiB'
    """
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    i = min(int(math.log(max(n, 1), 1024)), len(units) - 1)
    return f"{n / 1024**i:.1f} {units[i]}" if i else f"{n} B"


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
        TypeError: if one of them is a module with an adapter, from `jlora.nnx` or `jlora.keras`.

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
    for x, argument in ((base, "base"), (adapter, "adapter")):
        refuse_module(x, argument)
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
