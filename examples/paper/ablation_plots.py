"""Pictures of what `ablations` measured: scores with their errors, and maps of similarities."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

TITLES = {
    "movies": "MiniLM, movie reviews: accuracy",
    "definitions": "SmolLM2, definitions: nats a token",
}
PARTS = ("query", "value")
Table = Mapping[Any, Mapping[str, str]]  # rows by `ablations.Run`
Kind = tuple[str, int]  # matrices, rank


def scores(table: Table, task: str, kind: Kind) -> dict[int, tuple[float, float]]:
    """Score and standard error of a kind of run, by seed."""
    rows = {run.seed: row for run, row in table.items() if run[:3] == (task, *kind)}
    return {s: (float(rows[s]["score"]), float(rows[s]["standard_error"])) for s in sorted(rows)}


def points(
    axis: Axes, table: Table, task: str, kinds: Sequence[Kind], color: str, shift: float = 0.0
) -> None:
    """Scores with their standard errors, a column for each kind, the seeds side by side."""
    for i, kind in enumerate(kinds):
        for place, (score, error) in enumerate(scores(table, task, kind).values()):
            x = i + shift + 0.12 * place
            axis.errorbar(x, score, error, fmt="o", capsize=3, color=color)
    axis.set_title(TITLES[task], fontsize=10)


def matrices(axis: Axes, table: Table, task: str, kinds: Sequence[Kind]) -> None:
    """The scores of all choices of matrices."""
    points(axis, table, task, kinds, "C0")
    axis.set_xticks(range(len(kinds)), [f"{name}\nr = {rank}" for name, rank in kinds])


def ranks(axis: Axes, table: Table, task: str, every: Sequence[int]) -> None:
    """The scores of all ranks, on two and on four matrices."""
    for color, name, shift in (("C0", "q,v", 0.0), ("C1", "q,k,v,o", 0.3)):
        points(axis, table, task, [(name, rank) for rank in every], color, shift)
        axis.plot([], [], "o", color=color, label=name)
    axis.set_xticks(range(len(every)), [f"r = {rank}" for rank in every])
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)


def heat(axis: Axes, grid: np.ndarray) -> AxesImage:
    """A map of φ(i, j), i downwards."""
    extent = (0.5, grid.shape[1] + 0.5, grid.shape[0] + 0.5, 0.5)
    return axis.imshow(grid, extent=extent, aspect="auto", vmin=0, vmax=1)


def maps(rows: Mapping[str, Sequence[np.ndarray]], columns: Sequence[str], names: Any) -> Any:
    """A figure of maps, `rows` by their labels; `names` says what i and j are directions of."""
    shape = len(rows), len(columns)
    size = 2.9 * shape[1], 2.5 * shape[0]
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for axis, grid in zip(axes.flat, (grid for row in rows.values() for grid in row), strict=True):
        image = heat(axis, grid)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=10)
    for axis, row in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(f"{row}\ni, {names[0]}")
    for axis in axes[-1]:
        axis.set_xlabel(f"j, {names[1]}")
    figure.colorbar(image, ax=axes, label="φ(i, j)")
    return figure


def overview(
    path: pathlib.Path,
    table: Table,
    found: Mapping[str, Mapping[str, np.ndarray]],
    kinds: Sequence[Kind],
    every: Sequence[int],
) -> None:
    """Writes one picture of everything: matrices, ranks, and r = 8 beside r = 64."""
    figure = plt.figure(figsize=(10, 9), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2.3, 1))
    axes = above.subplots(2, 2)
    for (first, second), task in zip(axes.T, found, strict=True):
        matrices(first, table, task, kinds)
        ranks(second, table, task, every)
    columns = [(task, part) for task in found for part in PARTS]
    axes = below.subplots(1, len(columns))
    for axis, (task, part) in zip(axes, columns, strict=True):
        image = heat(axis, found[task][f"{part}/a/ranks"])
        axis.set_title(f"{task}, {part}", fontsize=10)
        axis.set_xlabel("j, r = 64")
    axes[0].set_ylabel("i, r = 8")
    below.colorbar(image, ax=axes, label="φ(i, j) of A")
    figure.savefig(path, dpi=80)
    plt.close(figure)
