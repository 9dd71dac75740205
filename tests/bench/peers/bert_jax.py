"""jlora on the examples' BERT with the weights that torch has written, and JAX's floor."""

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from models import bert

import jlora

from .. import steps
from . import bert_work, compare


def main(folder: pathlib.Path) -> None:
    """Reads the weights from `folder`, and serves the steps."""
    config, variables = bert.load(folder)
    apply = bert.Bert(config).apply
    batch = tuple(jnp.asarray(x) for x in bert_work.batch())
    rules = [jlora.LoRA(r"encoder/.*/kernel", rank=bert_work.RANK, alpha=bert_work.ALPHA)]
    tasks = {
        "floor": steps.leaves_task(apply, variables, "norm/", loss),
        "lora": steps.lora_task(apply, variables, rules, batch, loss, lambda batch: batch[:2]),
    }
    programs = {name: task.compile(batch) for name, task in tasks.items()}
    facts = {
        "trained": compare.count(programs["lora"].trained),
        "losses": [float(jax.jit(loss, static_argnums=0)(apply, variables, batch))],
    }
    turns = {name: lambda program=program: program.run(batch) for name, program in programs.items()}
    bert_work.serve(facts, turns)


def loss(apply: Callable[..., jax.Array], params: Any, batch: Any) -> jax.Array:
    """Mean square of the distance of the hidden states to the targets."""
    ids, mask, target = batch
    return ((apply(params, ids, mask) - target) ** 2).mean()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
