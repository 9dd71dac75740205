"""What XLA for TPUs fuses: bytes that a layer's operations access, with options of the compiler.

Nothing is copied ahead into a core's own memory, so that each byte counts once, and compiling
takes a tenth of the time. What is fused is the same.
"""

import functools
from typing import Any

import jlora
from jlora._compat import HURRIED
from jlora._progress import progress

from . import report, tpu

FLASH = tpu.LLAMA._replace(attention=tpu.flash)
SPLIT = FLASH._replace(split=True)
WIDE = tpu.Layer(dim=5120, hidden=13824, heads=40, groups=8, batch=1, length=4096)
ATTENTION = {"xla_tpu_dot_dot_fusion_duplicated": "true"}
RANK = 8


def run(quick: bool) -> None:
    """A row for each layer, chip, choice of options and of what is trained."""
    ours = jlora.compiler_options("tpu")
    few = {"": {}, "ours": ours}
    many = few | {"attention": ATTENTION, "both": ours | ATTENTION}
    shapes = (
        {"small": (tpu.SMALL, few)}
        if quick
        else {"flash": (FLASH, few), "split": (SPLIT, few), "wide": (WIDE, many)}
    )
    work = [
        (name, shape, chip, *choice)
        for name, (shape, options) in shapes.items()
        for chip in (("v5e",) if quick else ("v5e", "v6e", "v5p"))
        for choice in options.items()
    ]
    rows = [row for args in progress(work, "fusions") for row in measure(*args)]
    report.table(f"fusions: r = {RANK}, over the frozen step's without options", rows)


def measure(
    name: str, shape: tpu.Layer, chip: str, fused: str, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows of a layer on a chip with one choice of options."""
    step = functools.partial(tpu.step, shape, chip)
    options = HURRIED | options
    floor = step("floor", options=HURRIED)
    programs = {"floor": step("floor", options=options)}
    programs["at least"] = tpu.at_least(shape, RANK, programs["floor"])
    programs["q, v"] = step("jlora", RANK, r"[qv]", options=options)
    programs["all-linear"] = step("jlora", RANK, options=options)
    programs["plain"] = step("plain", RANK, options=options)
    programs["full"] = step("full", options=options)
    return [
        {
            "layer": name,
            "chip": chip,
            "options": fused,
            "trained": trained,
            "GB": cost.size / 1e9,
            "bytes": cost.size / floor.size,
            "GB moved": cost.moved / 1e9,
            "moved": cost.moved / floor.moved,
            "FLOPs": cost.flops / floor.flops,
        }
        for trained, cost in programs.items()
    ]
