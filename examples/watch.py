"""Training as one watches it: the best adapter is kept, and the losses are a file and a picture."""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tables
from conversations import Rows
from matplotlib.figure import Figure
from pod import State
from progress import progress
from quickstart import take


class Best(NamedTuple):
    """The adapter with the lowest NLL of held-out answers so far."""

    adapter: Any
    nll: float
    step: int


@dataclasses.dataclass
class Watch:
    """What is done between steps: it measures the adapter, keeps the best, and saves."""

    args: argparse.Namespace
    measure: Callable[[Any], float]
    save: Callable[[int, State], Any]
    note: Callable[..., None]
    best: Best

    def is_over(self, done: int) -> bool:
        """Whether the last `--patience` evaluations found nothing better."""
        patience = self.args.patience and self.args.patience * self.args.evaluate_every
        return bool(patience) and done - self.best.step >= patience

    def look(self, done: int, state: State, loss: float) -> None:
        """Measures and saves where it is time to, after `done` steps."""
        self.note(done, loss=loss)
        every = self.args.evaluate_every
        if every and (done % every == 0 or done == self.args.steps):
            nll = self.measure(state.adapter)
            progress.write(f"held-out NLL after {done} steps: {nll:.3f}")
            self.note(done, held_out=nll)
            if nll < self.best.nll:
                self.best = Best(state.adapter, nll, done)
        self.save(done, State(state.adapter, (state.optimizer, self.best)))


def train(
    state: State, base: Any, rows: Rows, step_fn: Any, plan: np.ndarray, start: int, watch: Watch
) -> tuple[State, list[float]]:
    """The state after a step for each row of `plan`, from `start` on, and the loss of each."""
    losses, tokens, began = [], 0, 0.0
    with progress(plan[start:], initial=start, total=len(plan)) as bar:
        bar.set_postfix_str("compiling")
        for done, index in enumerate(bar, start + 1):
            if watch.is_over(done - 1):
                break
            batch = take(rows, index)
            state, loss = step_fn(state, base, batch)
            losses.append(float(loss))
            seconds = time.perf_counter() - began
            if len(losses) == 1:  # with the time to compile
                began += seconds
                bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
            else:
                tokens, left = tokens + np.count_nonzero(batch.segments), len(plan) - done
                if len(losses) == 2:
                    progress.write(f"{left} more steps take {left * seconds:.0f} s")
                speed = f"{tokens / seconds:.0f} tokens/s"
                bar.set_postfix_str(f"loss {losses[-1]:.3f}, {speed}", refresh=False)
            paused = time.perf_counter()
            watch.look(done, state, losses[-1])
            began += time.perf_counter() - paused
    return state, losses


# ---- the file of losses ----


def begin(path: Path, start: int) -> None:
    """Keeps of a file what is up to the step from which a run goes on; nothing if from 0."""
    tables.write(path, [row for row in tables.read(path) if 0 < start >= row["step"]])


def note(path: Path, step: int, loss: float | str = "", held_out: float | str = "") -> None:
    """Adds the loss of a step, or of what is held out after so many."""
    tables.append(path, {"step": step, "loss": loss, "held_out": held_out})


def draw(path: Path) -> None:
    """Draws both curves beside the file."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="steps", ylabel="loss per token, nats")
    rows = tables.read(path)
    for name, style in (("loss", "-"), ("held_out", "o-")):
        found = [(row["step"], row[name]) for row in rows if row[name] != ""]
        axes.plot(*zip(*found, strict=True), style, label=name.replace("_", " "))
    axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=150)
