"""Training steps to compare, compiled once, and timed in turns."""

import ctypes
import dataclasses
import functools
import gc
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

import jlora
from jlora._progress import progress

ADAM = optax.adam(1e-4)
Loss = Callable[[Callable[..., jax.Array], Any, Any], jax.Array]  # of (apply, params, batch)


@dataclasses.dataclass
class Program:
    """A compiled step `(frozen, trained, moments, batch) -> (trained, moments, loss)`."""

    compiled: Any
    frozen: Any
    trained: Any
    moments: Any
    compile_s: float  # with tracing

    def run(self, batch: Any) -> float:
        """One step, in seconds."""
        start = time.perf_counter()
        out = self.compiled(self.frozen, self.trained, self.moments, batch)
        self.trained, self.moments, _ = jax.block_until_ready(out)
        return time.perf_counter() - start

    @property
    def temp(self) -> int:
        """Bytes that XLA allocates beside arguments and results."""
        return self.compiled.memory_analysis().temp_size_in_bytes

    @property
    def flops(self) -> float:
        """Floating-point operations as XLA counts them: the body of a scan once."""
        return self.compiled.cost_analysis()["flops"]


def compile_step(
    loss: Callable[..., jax.Array],
    frozen: Any,
    trained: Any,
    batch: Any,
    tx: optax.GradientTransformation = ADAM,
) -> Program:
    """A step of `tx` on `trained` for `loss(frozen, trained, batch)`; shapes suffice."""

    def step(frozen: Any, trained: Any, moments: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss, 1)(frozen, trained, batch)
        updates, moments = tx.update(grads, moments, trained)
        return optax.apply_updates(trained, updates), moments, value

    concrete = all(isinstance(x, jax.Array) for x in jax.tree.leaves(trained))
    moments = tx.init(trained) if concrete else jax.eval_shape(tx.init, trained)
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(1, 2)).lower(frozen, trained, moments, batch)
    compiled = lowered.compile(jlora.compiler_options())
    return Program(compiled, frozen, trained, moments, time.perf_counter() - start)


def next_token(apply: Callable[..., jax.Array], params: Any, ids: jax.Array) -> jax.Array:
    """Mean cross-entropy of each token given those before it."""
    logits = apply(params, ids[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


class Task(NamedTuple):
    """A loss of `(frozen, trained, batch)`, and the first two."""

    loss: Callable[..., jax.Array]
    frozen: Any
    trained: Any

    def compile(self, batch: Any, tx: optax.GradientTransformation = ADAM) -> Program:
        """A step of training."""
        return compile_step(self.loss, self.frozen, self.trained, batch, tx)

    def compile_cold(self, batch: Any) -> Program:
        """The same with nothing in JAX's caches, so that its seconds of compilation compare."""
        jax.clear_caches()
        gc.collect()
        return self.compile(batch)


def leaves_task(
    apply: Callable[..., jax.Array], params: Any, pattern: str, loss: Loss = next_token
) -> Task:
    """Trains the leaves whose path `pattern` is found in: the norms (the floor), or all."""
    flat = flatten_dict(params, sep="/")
    trained = {k: _copy(v) for k, v in flat.items() if re.search(pattern, k)}
    frozen = {k: v for k, v in flat.items() if k not in trained}

    def join_and_loss(frozen: Any, trained: Any, batch: Any) -> jax.Array:
        return loss(apply, unflatten_dict({**frozen, **trained}, sep="/"), batch)

    return Task(join_and_loss, frozen, trained)


def lora_task(
    apply: Callable[..., jax.Array],
    params: Any,
    rules: Sequence[Any],
    batch: Any,
    loss: Loss = next_token,
    inputs: Callable[[Any], tuple[Any, ...]] = lambda ids: (ids[:, :-1],),
) -> Task:
    """Trains the low-rank factors; `inputs` are the apply function's own arguments."""
    lora = jlora.transform(apply, *rules)
    concrete = all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))
    init = lora.init if concrete else functools.partial(jax.eval_shape, lora.init)
    base, adapter = init(jax.random.key(0), params, *inputs(batch))
    if concrete:
        # B is not left at zero: no product may be zero, or it might be cheaper.
        adapter = jax.tree.map(lambda x: x + 0.01, adapter)

    def adapted_loss(base: Any, adapter: Any, batch: Any) -> jax.Array:
        return loss(lambda base, *args: lora.apply(base, adapter, *args), base, batch)

    return Task(adapted_loss, base, adapter)


def interleave(
    programs: Mapping[Any, Any], batch: Any, rounds: int, title: str = ""
) -> dict[Any, np.ndarray]:
    """Seconds of each program, all run in turn in each round, after two rounds of warm-up."""
    seconds: dict[Any, list[float]] = {name: [] for name in programs}
    for i in progress(range(rounds + 2), title, leave=False):
        for name, program in programs.items():
            spent = program.run(batch)
            if i >= 2:
                seconds[name].append(spent)
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(seconds: np.ndarray, baseline: np.ndarray) -> float:
    """The median of the ratios, round by round: drift of the machine's speed cancels."""
    return float(np.median(seconds / baseline))


def compare(
    programs: Mapping[Any, Any], seconds: Mapping[Any, np.ndarray] | None, base: Any
) -> dict[Any, dict[str, float]]:
    """Time, if it was measured, and what XLA counts of each program but `base`, over that of it."""
    one = programs[base]
    return {
        name: ({} if seconds is None else {"time": ratio(seconds[name], seconds[base])})
        | {
            "FLOPs": program.flops / one.flops,
            "temp": program.temp / one.temp,
        }
        for name, program in programs.items()
        if name != base
    }


def median(seconds: np.ndarray) -> float:
    """In milliseconds."""
    return 1e3 * float(np.median(seconds))


def keep_memory() -> None:
    """Lets the C library keep the memory that a program frees, for the next call of it.

    glibc gives buffers above 32 MB back, so that every step maps and clears them anew: up to a
    third of its time, which a step with 33 MB pays and one with 31 MB does not.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        arenas, mapped, trim = -8, -4, -1  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
        mallopt(arenas, 1)
        mallopt(mapped, 0)
        mallopt(trim, 2**31 - 1)


def _copy(x: Any) -> Any:
    return jnp.array(x) if isinstance(x, jax.Array) else x
