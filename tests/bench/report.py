"""Tables in the terminal."""

import os
import pathlib
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

# The widest vectors come first: ratios between frameworks follow them.
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "asimd": "NEON"}


def machine() -> str:
    """What the numbers were measured on: the device or the cores and their instruction set."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        on = f"{cores} core(s), {instruction_set(pathlib.Path('/proc/cpuinfo'))}"
    else:
        on = f"{device.device_kind}, {jax.local_device_count()} device(s)"
    return f"{on}, JAX {jax.__version__}, Python {platform.python_version()}"


def instruction_set(cpuinfo: pathlib.Path) -> str:
    """The widest vectors that Linux says the processor has, or else its architecture."""
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return next((name for flag, name in VECTORS.items() if flag in flags), platform.machine())


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows under aligned headings."""
    columns = list(dict.fromkeys(k for row in rows for k in row))
    cells = [columns, *([_text(row.get(k, "")) for k in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    print(f"\n{title} ({machine()})\n")
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
