"""What XLA for TPUs fuses: bytes that a layer's operations access, with options of the compiler.

Nothing is copied ahead into a core's own memory, so that each byte counts once, and compiling
takes a tenth of the time. What is fused is the same.
"""

from typing import Any

import jlora
from jlora._compat import HURRIED
from jlora._progress import progress

from . import report, tpu

WIDE = tpu.Layer(dim=5120, hidden=13824, heads=40, groups=8, batch=1, length=4096)
ATTENTION = {"xla_tpu_dot_dot_fusion_duplicated": "true"}
RANK = 8


def run(quick: bool) -> None:
    """A row for each chip, choice of options and of what is trained."""
    shape, chips = (tpu.SMALL, ("v5e",)) if quick else (WIDE, ("v5e", "v6e", "v5p"))
    ours = jlora.compiler_options("tpu")
    options = {"": {}, "sums": ours, "attention": ATTENTION, "both": ours | ATTENTION}
    work = [(chip, *choice) for chip in chips for choice in options.items()]
    rows = [row for args in progress(work, "fusions") for row in measure(shape, *args)]
    report.table(f"fusions: r = {RANK}, over the frozen step's without options", rows)


def measure(
    shape: tpu.Layer, chip: str, fused: str, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows of a chip with one choice of options."""
    options = HURRIED | options
    floor = tpu.step(shape, chip, "floor", options=HURRIED)
    programs = {"floor": tpu.step(shape, chip, "floor", options=options)}
    programs["at least"] = tpu.at_least(shape, RANK, programs["floor"])
    for name, pattern in (("q, v", r"[qv]"), ("all-linear", r"w/(?!norm).*")):
        programs[name] = tpu.step(shape, chip, "jlora", RANK, pattern, options=options)
    programs["plain"] = tpu.step(shape, chip, "plain", RANK, options=options)
    return [
        {
            "chip": chip,
            "fused": fused,
            "trained": trained,
            "GB": cost.size / 1e9,
            "bytes": cost.size / floor.size,
            "FLOPs": cost.flops / floor.flops,
        }
        for trained, cost in programs.items()
    ]
