"""Whether the tensors of an adapter fit the parameters of a tree, or of a checkpoint."""

import math

from ..._errors import Problem
from ..names._kinds import CONV, EXPERTS, LINEAR
from ..places._declared import is_table
from ..places._views import Shape
from ._parts import INDICES, Part, T, Whole


def list_misfits(part: Part[T], shape: Shape, transposed: bool | None = None) -> list[Problem]:
    """Lists why A and B do not fit a weight of `shape`.

    A name table says whether PyTorch stores it `transposed`, and so the shape of each tensor. A
    checkpoint does not.
    """
    if transposed is not None:
        a, b = part.shapes(shape, transposed)
        return _list_misshapen(part.a, part.name, a) + _list_misshapen(part.b, part.name, b)
    if list_orientations(part, shape):
        return []
    is_swapped = sorted(shape) == sorted(part.matrix)
    swapped = ": A has the outputs, and B the inputs" * is_swapped
    made = f"A {part.a.shape} and B {part.b.shape} make {part.matrix}"
    why = f"expected a {part.kind.name} weight of shape {shape}, but {made}{swapped}"
    return [Problem(part.name, why)]


def list_orientations(part: Part[T], shape: Shape) -> list[bool]:
    """Lists whether a weight of a shape may be B·A (False) or its transpose (True)."""
    part = fit_axes(part, shape)
    stack = (part.experts,) if part.kind is EXPERTS else ()
    if not part.experts or len(shape) < 2 + len(stack) or shape[: len(stack)] != stack:
        return []
    known = part.transposed if part.kind.transposed is None else part.kind.transposed
    own = [part.a.shape, part.b.shape]
    return [t for t in (False, True) if known in (None, t) and part.shapes(shape, t) == own]


def fit_axes(part: Part[T], shape: Shape) -> Part[T]:
    """Gives A and B of a matrix the axes of a 1×1 convolution of `shape`, or takes them away.

    Some tools write the one for the other.
    """
    rest = shape[2:]
    extra = {*rest, *part.a.shape[2:], *part.b.shape[2:]}
    if part.kind not in (LINEAR, CONV) or len(shape) < 2 or extra != {1}:
        return part
    a, b = (x.reshape(x.shape[:2] + rest) for x in (part.a, part.b))
    part = part._replace(kind=CONV if rest else LINEAR, a=a, b=b)
    if part.m is None or math.prod(part.m.shape) != b.shape[0]:
        return part
    return part._replace(m=part.m.reshape(part.further_shape))


def list_misfits_in_full(whole: Whole[T], shape: Shape, dtype: str = "") -> list[Problem]:
    """Lists why new values do not fit a parameter of `shape`, and of `dtype` in a checkpoint."""
    if whole.rows:
        found = _list_misshapen(whole.x, whole.key, (len(whole.rows), *shape[1:]))
        if (last := max(whole.rows)) >= shape[0]:
            why = f"{INDICES} lists row {last}, but there are {shape[0]} rows"
            found.append(Problem(whole.module, why, "Resize the vocabulary as in training."))
        return found
    if problem := explain_resized(whole, shape):
        return [problem]
    if dtype and whole.x.shape != shape:
        why = f"expected {dtype} of shape {shape}, got {whole.x.shape} in the adapter"
        return [Problem(whole.name, why)]
    return _list_misshapen(whole.x, whole.key, shape)


def _list_misshapen(x: T, name: str, shape: Shape) -> list[Problem]:
    why = f"expected shape {shape}, got {x.shape}"
    return [] if x.shape == shape else [Problem(getattr(x, "key", name), why)]


def explain_resized(whole: Whole[T], wanted: Shape) -> Problem | None:
    """Explains a misfit that comes from a vocabulary of another size, if it does."""
    shape = whole.x.shape
    parameter = whole.name.rpartition(".")[2]
    if shape == wanted or shape[1:] != wanted[1:] or not is_of_vocabulary(whole.module, parameter):
        return None
    return Problem(
        whole.name,
        f"has {shape[0]} rows in the adapter, whose vocabulary was resized, but {wanted[0]} in the "
        "base",
        "Merge it with jlora.peft.export_merged, which adds rows, or call "
        f"resize_token_embeddings({shape[0]}) on the base in `transformers`, and save it.",
    )


def is_of_vocabulary(module: str, parameter: str) -> bool:
    """Whether PEFT saves a parameter automatically after the vocabulary was resized."""
    return parameter in ("weight", "bias") and is_table(module)
