"""Refuses what a module does and JAX cannot, with the module and the line that does it."""

import inspect
import operator
import pathlib
import types
from collections.abc import Iterator
from typing import Any, NoReturn

import torch  # pyright: ignore[reportMissingImports]

from .._private import is_composite

CONTROL = {torch.ops.higher_order.cond, torch.ops.higher_order.while_loop}
SAME = "which would be the same in each call of a compiled function"
DRAWN = f"draws random numbers, {SAME}", "Give it the numbers as an argument."


def refuse(does: str, remedy: str, cause: Exception | None = None) -> NoReturn:
    """Raises; `does` begins with a verb whose subject is the module."""
    raise NotImplementedError(f"{find_place()} {does}. {remedy}") from cause


def walk(frame: types.FrameType | None = None) -> Iterator[types.FrameType]:
    """Yields the frame of the caller, or the one given, and those around it."""
    frame = frame or inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def find_place(frame: types.FrameType | None = None) -> str:
    """Finds the innermost module that runs, in a frame or around it, and its line."""
    found: list[tuple[torch.nn.Module, str]] = []
    for each in walk(frame):
        code = each.f_code
        first = each.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(first, torch.nn.Module):
            found.append((first, f"{pathlib.Path(code.co_filename).name}:{each.f_lineno}"))
    names = {m: name for name, m in found[-1][0].named_modules()} if found else {}
    known = ((names.get(m, ""), type(m).__name__, line) for m, line in found)
    name, kind, line = next(filter(operator.itemgetter(0), known), ("", "", ""))
    place = name.removeprefix("model").strip(".") or "The model"
    return f"{place} ({kind}, {line})" if name else place


def check_call(func: Any) -> None:
    """Refuses functions that draw, or that branch on values, and mixed precision."""
    is_drawing = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
    if is_drawing and not is_composite(func):
        refuse(*DRAWN)
    if func in CONTROL:
        refuse(f"calls {func}, whose functions JAX cannot trace", "Write it by torch.where.")
    if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        refuse(
            "runs under torch.autocast, which JAX has not",
            "Convert the model by model.to(torch.bfloat16), and leave autocast out.",
        )
