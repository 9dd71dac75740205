"""Training by a recipe: AdamW, linear warm-up and decay, and the epoch that is best on the dev set.

trainer = training.trainer(method.apply, problem, recipe)
best = training.train(trainer, base, adapter, seed=0)
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from progress import progress

import jlora

from .problems import Problem
from .table import Recipe


class Best(NamedTuple):
    """The epoch, from 1, with the highest first score, the earliest of several; its mean loss."""

    epoch: int
    scores: dict[str, float]
    loss: float
    adapter: Any


class Trainer(NamedTuple):
    """What the seeds have in common; see `trainer`."""

    apply: Callable[..., jax.Array]
    problem: Problem
    epochs: int
    tx: optax.GradientTransformation
    step: Callable[..., tuple[Any, Any, jax.Array]]


def schedule(recipe: Recipe, examples: int) -> optax.Schedule:
    """The learning rate of each step: linear from 0 to the highest, then back to 0.

    Example:
        >>> from paper.tasks import table
        >>> rate = schedule(table.Recipe(1.0, 2, 3, 8, 4, 4, warmup_steps=2), examples=4)
        >>> [float(rate(step)) for step in range(6)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    """
    steps, warmup = recipe.steps(examples), recipe.warmup(examples)
    up = optax.linear_schedule(0.0, recipe.learning_rate, warmup)
    down = optax.linear_schedule(recipe.learning_rate, 0.0, steps - warmup)
    return optax.join_schedules([up, down], [warmup])


def optimizer(recipe: Recipe, examples: int) -> optax.GradientTransformation:
    """AdamW for all that a method trains; biases and norms do not decay, as in `transformers`."""

    def decays(tree: Any) -> Any:
        def decay(path: Any, _: Any) -> bool:
            return not any(name in jax.tree_util.keystr(path) for name in ("bias", "norm", "ln_"))

        return jax.tree_util.tree_map_with_path(decay, tree)

    rate = schedule(recipe, examples)
    adamw = optax.adamw(rate, weight_decay=recipe.weight_decay, mask=decays)
    clip = optax.clip_by_global_norm(recipe.clip) if recipe.clip else optax.identity()
    return optax.chain(clip, adamw)


def trainer(apply: Callable[..., jax.Array], problem: Problem, recipe: Recipe) -> Trainer:
    """Compiles once for all seeds.

    Args:
        apply: of a method, ``(base, adapter, *inputs, rngs=…)`` to logits.
        problem: to learn.
        recipe: the settings.
    """
    tx = optimizer(recipe, problem.examples)

    def loss_fn(adapter: Any, base: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> Any:
        own, models = jax.random.split(key)
        inputs = [batch[name] for name in problem.inputs]
        logits = apply(base, jlora.dropout(adapter, own), *inputs, rngs={"dropout": models})
        return problem.loss(logits, batch)

    @jax.jit
    def step(adapter: Any, state: Any, base: Any, batch: Any, key: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(adapter, base, batch, key)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, loss

    return Trainer(apply, problem, recipe.epochs, tx, step)


def train(trainer: Trainer, base: Any, adapter: Any, seed: int) -> Best:
    """Trains over all epochs.

    Args:
        trainer: the method, problem and recipe.
        base: the frozen tree.
        adapter: to begin with.
        seed: of the order of the examples, and of dropout.

    Raises:
        FloatingPointError: the loss is no number.
    """
    data, state, key = trainer.problem.batches(seed), trainer.tx.init(adapter), jax.random.key(seed)
    best, steps = None, len(data) // trainer.epochs
    with progress(total=len(data), desc=f"seed {seed}") as bar:
        for epoch in range(trainer.epochs):
            losses = []
            for number in range(epoch * steps, (epoch + 1) * steps):
                now = jax.random.fold_in(key, number)
                adapter, state, loss = trainer.step(adapter, state, base, data[number], now)
                losses.append(loss)
                bar.update()
            mean = float(np.mean(jax.device_get(losses)))
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"seed {seed}, epoch {epoch + 1}: the loss is {mean}. Give a lower "
                    "--learning-rate, or --dtype float32"
                )
            scores = trainer.problem.dev(jax.tree_util.Partial(trainer.apply, base, adapter))
            bar.set_postfix(loss=f"{mean:.3f}", **{k: f"{v:.3f}" for k, v in scores.items()})
            if best is None or _first(scores) > _first(best.scores):
                best = Best(epoch + 1, scores, mean, adapter)
    assert best is not None  # a recipe has an epoch at least
    return best


def _first(scores: Mapping[str, float]) -> float:
    """What epochs are compared by; a correlation that is not defined is the worst."""
    score = next(iter(scores.values()))
    return -math.inf if math.isnan(score) else score
