"""LoKr: the Kronecker product of two matrices."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ._other import Arrays, Fields, Form, Other, Shapes, no_matrices


class _Product(NamedTuple):
    """A factor of a Kronecker product as a product of its own, of (rows, r) and (r, columns)."""

    rows: int
    rank: int
    columns: int
    make: Callable[[Arrays], tuple[np.ndarray, np.ndarray]]


def _product(shapes: Shapes, name: str) -> _Product | str:
    left, right = f"{name}_a", f"{name}_b"
    if name not in shapes:
        if why := no_matrices(shapes, left, right):
            return why
        (rows, rank), (other, columns) = shapes[left], shapes[right]
        if rank != other:
            return f"{left} {shapes[left]} and {right} {shapes[right]} do not fit"
        return _Product(rows, rank, columns, lambda x: (x[left], x[right]))
    if left in shapes or right in shapes:
        return f"{name} is there both whole and as a product"
    if why := no_matrices(shapes, name):
        return why
    rows, columns = shapes[name]
    rank = min(rows, columns)

    def make(x: Arrays) -> tuple[np.ndarray, np.ndarray]:
        one = np.eye(rank, dtype=np.float32)
        return (one, x[name]) if rows == rank else (x[name], one)

    return _Product(rows, rank, columns, make)


def _lokr(fields: Fields, shapes: Shapes, inputs: int | None) -> Form | str:
    del fields, inputs
    if "lokr_t2" in shapes:
        return "lokr_t2 is of a convolution, which has no such A and B"
    first, second = (_product(shapes, name) for name in ("lokr_w1", "lokr_w2"))
    if isinstance(first, str) or isinstance(second, str):
        return first if isinstance(first, str) else str(second)
    outputs, inputs = first.rows * second.rows, first.columns * second.columns
    rank = first.rank * second.rank
    if rank >= min(outputs, inputs):
        return (
            f"its ΔW may have rank {rank}, of {inputs} inputs and {outputs} outputs; merge it into "
            "the model in PEFT"
        )

    def make(x: Arrays) -> tuple[np.ndarray, np.ndarray]:
        (left, right), (low, high) = first.make(x), second.make(x)
        return np.kron(right, high), np.kron(left, low)

    return Form((rank, inputs), (outputs, rank), make)


def _renamed(fields: Fields) -> Fields:
    """LoKr's: `alpha` is LoRA's `lora_alpha`."""
    names = {"r": "r", "alpha": "lora_alpha"} | {x: x for x in ("rank_pattern", "alpha_pattern")}
    return {new: fields[old] for old, new in names.items() if old in fields}


_ENDS = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")

LOKR = Other(
    fields=frozenset(
        (
            "alpha",
            "decompose_both",
            "decompose_factor",
            "init_weights",
            "module_dropout",
            "rank_dropout",
            "rank_dropout_scale",
            "use_effective_conv2d",
        )
    ),
    ranks=("r",),
    tensors=tuple(f"lokr_{end}" for end in _ENDS),
    shared=(),
    form=_lokr,
    scales=_renamed,
)
