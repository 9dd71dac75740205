"""Tables in the terminal and as CSV."""

import csv
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax


def machine() -> str:
    """What the numbers were measured on."""
    device = jax.devices()[0]
    cores = f", {jax.local_device_count()} device(s)" if device.platform != "cpu" else ""
    return f"{device.device_kind}{cores}, JAX {jax.__version__}, Python {platform.python_version()}"


def table(title: str, rows: Sequence[Mapping[str, Any]], out: pathlib.Path | None) -> None:
    """Prints rows under aligned headings; writes `<out>/<first word of title>.csv`."""
    columns = list(dict.fromkeys(k for row in rows for k in row))
    cells = [columns, *([_text(row.get(k, "")) for k in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    print(f"\n{title} ({machine()})\n")
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / f"{title.split()[0].strip(':,').lower()}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
