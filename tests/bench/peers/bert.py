"""PEFT in torch against jlora in JAX: the same BERT, batch, loss, optimizer and CPUs."""

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from models import bert

import jlora

from .. import steps
from . import bert_work, compare, environment

STEPS = 3  # in a turn, of which the median counts


class Turn(NamedTuple):
    """Some steps of a program: a function of their number that gives their seconds."""

    seconds: Callable[[int], list[float]]

    def run(self, _: None) -> float:
        """The seconds of a step."""
        return float(np.median(self.seconds(STEPS)))


def run(rounds: int) -> dict:
    """A row of milliseconds and ratios, or of the reason why there is none."""
    sizes = bert_work.SIZES
    tokens = bert_work.BATCH * bert_work.LENGTH
    shape = f"{sizes['num_hidden_layers']} layers, d={sizes['hidden_size']}, {tokens} tokens"
    try:
        return {"model": shape, "CPUs": environment.cpus(), **measure(rounds)}
    except environment.PeerError as error:
        return {"model": shape, "note": str(error)}


def measure(rounds: int) -> dict:
    """Starts the process of torch, compares what both compute, and lets them take turns."""
    with (
        tempfile.TemporaryDirectory() as folder,
        environment.start("peft", "bert_torch", [folder]) as torch,
    ):
        theirs = torch.answer()
        batch = tuple(jnp.asarray(x) for x in bert_work.batch())
        programs, first = in_jax(pathlib.Path(folder), batch)
        trained = compare.count(programs["lora"].trained)
        if theirs["trained"] != trained:
            raise environment.PeerError(f"PEFT trains {theirs['trained']:,}, not {trained:,}")
        losses = [*theirs["losses"], first]
        if max(losses) - min(losses) > 1e-4:
            raise environment.PeerError(f"losses of torch, PEFT and JAX differ: {losses}")
        turns = {}
        for name in ("floor", "lora"):
            ask = lambda n, name=name: torch.ask(f"{name} {n}")["seconds"]  # noqa: E731
            own = lambda n, p=programs[name]: [p.run(batch) for _ in range(n)]  # noqa: E731
            turns |= {("torch", name): Turn(ask), ("jax", name): Turn(own)}
        times = steps.interleave(turns, None, rounds, "PEFT")
    return {
        "PEFT ms": steps.median(times["torch", "lora"]),
        "torch floor ms": steps.median(times["torch", "floor"]),
        "jlora ms": steps.median(times["jax", "lora"]),
        "JAX floor ms": steps.median(times["jax", "floor"]),
        "PEFT/jlora": steps.ratio(times["torch", "lora"], times["jax", "lora"]),
        "PEFT/torch floor": steps.ratio(times["torch", "lora"], times["torch", "floor"]),
        "jlora/JAX floor": steps.ratio(times["jax", "lora"], times["jax", "floor"]),
        "trained": trained,
        "versions": theirs["versions"],
    }


def in_jax(folder: pathlib.Path, batch: Any) -> tuple[dict[str, steps.Program], float]:
    """Steps of jlora and of JAX's floor on the weights that torch has written, and the loss."""
    config, variables = bert.load(folder)
    apply = bert.Bert(config).apply
    rules = [jlora.LoRA(r"encoder/.*/kernel", rank=bert_work.RANK, alpha=bert_work.ALPHA)]
    tasks = {
        "floor": steps.leaves_task(apply, variables, "norm/", loss),
        "lora": steps.lora_task(apply, variables, rules, batch, loss, lambda batch: batch[:2]),
    }
    first = float(jax.jit(loss, static_argnums=0)(apply, variables, batch))
    return {name: task.compile(batch) for name, task in tasks.items()}, first


def loss(apply: Callable[..., jax.Array], params: Any, batch: Any) -> jax.Array:
    """Mean square of the distance of the hidden states to the targets."""
    ids, mask, target = batch
    return ((apply(params, ids, mask) - target) ** 2).mean()
