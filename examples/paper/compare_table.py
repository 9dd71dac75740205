"""What `compare` measured, as one table and one picture.

    python examples/paper compare_table       # of examples/paper/results, as far as the runs are

Read OUT/methods_runs.csv, methods_costs.csv and methods_latency.csv; write OUT/methods.csv, a row
for each method, and OUT/methods.png, of which the guides have a copy.
"""

import collections
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import tables
from tables import Row

LABELS = {
    "full": "full fine-tuning",
    "bitfit": "BitFit",
    "adapter_h": "AdapterH",
    "adapter_l": "AdapterL",
    "pre_embed": "PreEmbed",
    "pre_layer": "PreLayer",
    "prompt": "prompt tuning",
    "lora": "LoRA q, v",
    "lora_all": "LoRA, all linear",
    "lora_merged": "LoRA, merged",
}


# ---- the table ----------------------------------------------------------------------------------


def summary(out: pathlib.Path) -> list[Row]:
    """A row for each method that has run, and whose costs are measured."""
    runs, times = collections.defaultdict(list), collections.defaultdict(dict)
    for row in tables.read(out / "methods_runs.csv"):
        runs[row["method"]].append(row)
    for row in tables.read(out / "methods_latency.csv"):
        times[row["method"]][f"latency_{row['batch']}x{row['tokens']}"] = row["ratio"]
    costs = {row["method"]: row for row in tables.read(out / "methods_costs.csv")}
    times["bitfit"] = times["full"]  # the same program
    both = [name for name in LABELS if name in runs and name in costs]
    return [_row(runs[name], costs[name], times[name]) for name in both]


def _row(runs: list[Row], cost: Row, latency: Row) -> Row:
    best, mean, error = tables.best(runs, "held_out", -1)
    return {
        "method": cost["method"],
        **best,
        "accuracy": round(mean, 6),
        "standard_error": round(error, 6),
        "trained": cost["trained"] - cost["head"],
        "trained_with_head": cost["trained"],
        "file_bytes": cost["file_bytes"],
        "optimizer_bytes": cost["optimizer_bytes"],
        "gradient_bytes": cost["trained_bytes"],
        "memory_bytes": cost["argument_bytes"] + cost["temp_bytes"],
        "step_ratio": cost["step_ratio"],
        **latency,
    }


# ---- the picture --------------------------------------------------------------------------------


def plot_accuracy(ax: Any, table: Sequence[Row]) -> None:
    """Held-out accuracy against trained parameters, with standard errors."""
    for row in sorted(table, key=lambda row: -row["accuracy"]):
        y, error = 100 * row["accuracy"], 100 * row["standard_error"]
        ax.errorbar(row["trained"], y, error, fmt="o", capsize=3, label=LABELS[row["method"]])
    ax.set(xscale="log", xlabel="trained parameters without the head", ylabel="accuracy, %")
    ax.legend(fontsize=8)


def plot_latency(ax: Any, rows: Sequence[Row]) -> None:
    """Latency over the base model's, minus 1, with the quartiles."""
    settings = list(dict.fromkeys((r["batch"], r["tokens"]) for r in rows))
    names = list(dict.fromkeys(r["method"] for r in rows if r["method"] != "full"))
    for i, setting in enumerate(settings):
        of = {r["method"]: r for r in rows if (r["batch"], r["tokens"]) == setting}
        y, low, high = (
            100 * np.array([of[name][key] - 1 for name in names])
            for key in ("ratio", "low", "high")
        )
        at = np.arange(len(names)) + 0.27 * (i - (len(settings) - 1) / 2)
        errors = np.maximum([y - low, high - y], 0)
        ax.barh(at, y, 0.25, xerr=errors, label=f"{setting[0]} × {setting[1]} tokens")
    ax.set_yticks(np.arange(len(names)), [LABELS[name] for name in names])
    ax.invert_yaxis()
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set(xlabel="latency added to the base model's, %")
    ax.legend(fontsize=8)


def write(out: pathlib.Path) -> None:
    """Writes the table and the picture.

    Raises:
        ValueError: no method has both runs and costs.
    """
    if not (table := summary(out)):
        raise ValueError(
            f"`{out}` must have methods_runs.csv, and methods_costs.csv of the same methods. "
            "`compare` writes them, the costs last."
        )
    tables.write(out / "methods.csv", table)
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    plot_accuracy(axes[0], table)
    plot_latency(axes[1], tables.read(out / "methods_latency.csv"))
    figure.savefig(out / "methods.png", dpi=100)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes them for the folder that `argv` names, else for the one beside this file."""
    write(pathlib.Path(argv[0]) if argv else pathlib.Path(__file__).parent / "results")
