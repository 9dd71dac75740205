"""PEFT in torch against jlora in JAX: the same BERT, batch, loss, optimizer and CPUs."""

import tempfile
from typing import NamedTuple

import numpy as np

from .. import steps
from . import bert_work, environment

STEPS = 3  # in a turn, of which the median counts


def compare(rounds: int) -> dict:
    """A row of milliseconds and ratios, or of the reason why there is none."""
    sizes = bert_work.SIZES
    tokens = bert_work.BATCH * bert_work.LENGTH
    shape = f"{sizes['num_hidden_layers']} layers, d={sizes['hidden_size']}, {tokens} tokens"
    try:
        return {"model": shape, "CPUs": environment.cpus(), **measure(rounds)}
    except environment.PeerError as error:
        return {"model": shape, "note": str(error)}


def measure(rounds: int) -> dict:
    """Starts both processes, compares what they compute, and lets them take turns."""
    with (
        tempfile.TemporaryDirectory() as folder,
        environment.start("peft", "bert_torch", [folder]) as torch,
    ):
        theirs = torch.answer()
        with environment.start("peft", "bert_jax", [folder]) as jax:
            ours = jax.answer()
            check(theirs, ours)
            children = {"torch": torch, "jax": jax}
            turns = {(n, p): Turn(children[n], p) for p in ("floor", "lora") for n in children}
            times = steps.interleave(turns, None, rounds, "PEFT")
    return {
        "PEFT ms": steps.median(times["torch", "lora"]),
        "torch floor ms": steps.median(times["torch", "floor"]),
        "jlora ms": steps.median(times["jax", "lora"]),
        "JAX floor ms": steps.median(times["jax", "floor"]),
        "PEFT/jlora": steps.ratio(times["torch", "lora"], times["jax", "lora"]),
        "PEFT/torch floor": steps.ratio(times["torch", "lora"], times["torch", "floor"]),
        "jlora/JAX floor": steps.ratio(times["jax", "lora"], times["jax", "floor"]),
        "trained": ours["trained"],
        "versions": theirs["versions"],
    }


def check(theirs: dict, ours: dict) -> None:
    """As many trained parameters, and the same loss before the first step."""
    if theirs["trained"] != ours["trained"]:
        raise environment.PeerError(f"PEFT trains {theirs['trained']:,}, not {ours['trained']:,}")
    losses = theirs["losses"] + ours["losses"]
    if max(losses) - min(losses) > 1e-4:
        raise environment.PeerError(f"losses of torch, PEFT and JAX differ: {losses}")


class Turn(NamedTuple):
    """Some steps of a program in a child."""

    child: environment.Child
    program: str

    def run(self, _: None) -> float:
        """The seconds of a step."""
        return float(np.median(self.child.ask(f"{self.program} {STEPS}")["seconds"]))
