"""What a method of PEFT's says of how it is LoRA."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Fields = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
Arrays = Mapping[str, np.ndarray]

UNKNOWN = (
    "not among the matrices of the base model, such as the folder `checkpoint`, which says how "
    "many inputs it has"
)
# Fields of its own, and tensors without PEFT's prefix; or why it is none.
Written = tuple[Fields, dict[str, np.ndarray]] | list[str]


class Form(NamedTuple):
    """A and B of a module, before a value is read.

    Attributes:
        a: the shape of A, (r, inputs).
        b: the shape of B, (outputs, r).
        make: A and B of the tensors of the module and those that all share.
    """

    a: tuple[int, int]
    b: tuple[int, int]
    make: Callable[[Arrays], tuple[np.ndarray, np.ndarray]]


class Back(NamedTuple):
    """How adapters of LoRA are written.

    Attributes:
        defaults: all fields that PEFT writes.
        make: what A and s·B of each module are, in PEFT's layout.
    """

    defaults: Fields
    make: Callable[[Mapping[str, tuple[np.ndarray, np.ndarray]]], Written]


class Other(NamedTuple):
    """A method.

    Attributes:
        fields: keys of its configuration beside LoRA's that do not change what is computed.
        ranks: those of its keys that are ranks, which must be there.
        tensors: how those of a module end.
        shared: the names of those that all modules share.
        form: `(fields, shapes, inputs) -> Form`, of the shapes by those names; or why there is
            none. `inputs` are those of the module if the base model is known.
        scales: the fields by which LoRA has the same scales.
        bias: what its field `bias` is where LoRA's is `lora_only`.
        dropout: the field that is LoRA's `lora_dropout`.
        frozen: `("a",)` where A is not trained.
        back: how LoRA is written so; None where it is only read.
    """

    fields: frozenset[str]
    ranks: tuple[str, ...]
    tensors: tuple[str, ...]
    shared: tuple[str, ...]
    form: Callable[[Fields, Shapes, int | None], Form | str]
    scales: Callable[[Fields], Fields]
    bias: str = "lora_only"
    dropout: str = ""
    frozen: tuple[str, ...] = ()
    back: Back | None = None


def no_matrices(shapes: Shapes, *names: str) -> str | None:
    """Why not all of these are there, as matrices."""
    for name in names:
        if name not in shapes:
            return f"{name} is missing"
        if len(shapes[name]) != 2:
            return f"{name} has shape {shapes[name]}; expected a matrix, as of a linear module"
    return None
