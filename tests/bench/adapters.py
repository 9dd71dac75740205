"""Many adapters on one base: rows of a batch with an adapter each."""

import math
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora import many

from . import model, report, steps

SHAPE = model.Shape(layers=4, dim=512, heads=8, batch=64, length=32)
LONG = SHAPE._replace(layers=2, length=128)  # rows with enough tokens for products of their own
TINY = model.Shape(layers=2, dim=128, heads=2, batch=8, length=8, vocab=128)
RANK = 16
RULES = {"q, v": model.attention, "all-linear": model.all_linear}
ROUTES = {"route": None, "side by side": "side by side", "gathered": "gathered"}


def run(quick: bool) -> None:
    """Throughput by the number of adapters; target: 64 of rank 16 at 0.95 of one's."""
    rounds, counts = (2, (1, 8)) if quick else (9, (1, 8, 64))
    for shape in (TINY,) if quick else (SHAPE, LONG):
        served = []
        for name, rules in RULES.items():
            served += serving(Setting.make(shape, rules(RANK)), name, counts, rounds)
        title = f"{shape.layers} layers, d={shape.dim}, {shape.batch} rows of {shape.length} tokens"
        report.table(f"serving: {title}, rank {RANK}, against one adapter", served)


class Setting(NamedTuple):
    """A model, its base, and what makes adapters for it."""

    lora: jlora.types.Transformed
    base: Any
    template: Any
    ids: jax.Array

    @classmethod
    def make(cls, shape: model.Shape, rules: list[jlora.LoRA]) -> "Setting":
        """`ids` has one more token than the model reads, the last one's label."""
        lm = model.LM(shape)
        ids, params = model.batch_and_params(lm)
        lora = jlora.transform(lm.apply, *rules)
        base, template = lora.init(jax.random.key(0), params, ids[:, :-1])
        return cls(lora, base, template, ids)

    def stacked(self, count: int) -> Any:
        """Random adapters along a new leading axis, so large that each changes the outputs."""
        leaves, tree = jax.tree.flatten(self.template)
        keys = jax.random.split(jax.random.key(2), len(leaves))
        draw = [
            0.05 * jax.random.normal(key, (count, *x.shape), x.dtype)
            for key, x in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, draw)


class Call(NamedTuple):
    """A compiled function and its arguments; or several of them, to run one after another."""

    compiled: Any
    arguments: list[tuple[Any, ...]]

    @classmethod
    def make(cls, f: Callable[..., Any], *arguments: tuple[Any, ...]) -> "Call":
        """One program for all arguments: their shapes must agree."""
        return cls(jax.jit(f).lower(*arguments[0]).compile(), list(arguments))

    def __call__(self) -> np.ndarray:
        """The results, one below the other."""
        return np.concatenate([self.compiled(*arguments) for arguments in self.arguments])

    def run(self, _: Any) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        jax.block_until_ready([self.compiled(*arguments) for arguments in self.arguments])
        return time.perf_counter() - start

    @property
    def temp(self) -> int:
        """Bytes that XLA allocates beside arguments and results."""
        return self.compiled.memory_analysis().temp_size_in_bytes


# ------------------------------------------------------------------------------------- serving


def serving(setting: Setting, name: str, counts: tuple[int, ...], rounds: int) -> list[dict]:
    """Rows per second by the number of adapters in the batch, and how they come to their rows."""
    ids = setting.ids[:, :-1]
    whole = Call.make(setting.lora.apply, (setting.base, _nth(setting.stacked(1), 0), ids))
    calls = {("all rows", 1): whole}
    for count in counts:
        calls |= {(how, count): call for how, call in _ways(setting, count, ids).items()}
    for (how, count), call in calls.items():
        if how == "loop":
            _check_rows(setting, call(), *(calls[way, count] for way in (*ROUTES, "groups")))
            _check_memory(setting, count, whole, calls["gathered", count], calls["groups", count])
    seconds = steps.interleave(calls, None, rounds, f"serving, {name}")
    return [
        {
            "sites": name,
            "adapters": count,
            "how": how,
            "throughput": steps.ratio(whole_seconds, seconds[how, count]),
            "over the loop": steps.ratio(
                seconds.get(("loop", count), whole_seconds), seconds[how, count]
            ),
        }
        for whole_seconds in [seconds["all rows", 1]]
        for (how, count), call in calls.items()
    ]


def _ways(setting: Setting, count: int, ids: jax.Array) -> dict[str, Call]:
    """The same rows with the same adapters, computed in several ways.

    - route, as it chooses, and in each of its forms: row i names its adapter, i // (rows / count)
      here; any assignment would do;
    - groups: equally many rows for each adapter, which lie together;
    - loop: one adapter after another.
    """
    lora, base, adapters = setting.lora, setting.base, setting.stacked(count)
    each = len(ids) // count
    which = jnp.repeat(jnp.arange(count), each)
    routed = {how: many.route(lora.apply, form=form) for how, form in ROUTES.items()}

    def groups(base: Any, adapters: Any, ids: jax.Array) -> jax.Array:
        rows = ids.reshape(count, each, -1)
        out = jax.vmap(lora.apply, in_axes=(None, 0, 0))(base, adapters, rows)
        return out.reshape(len(ids), *out.shape[2:])

    parts = [(base, _nth(adapters, k), ids[k * each : (k + 1) * each]) for k in range(count)]
    calls = {how: Call.make(f, (base, adapters, which, ids)) for how, f in routed.items()}
    return calls | {
        "groups": Call.make(groups, (base, adapters, ids)),
        "loop": Call.make(lora.apply, *parts),
    }


def _check_rows(setting: Setting, alone: np.ndarray, *calls: Call) -> None:
    """Each row is what it is alone with its adapter, and not what the base gives."""
    nothing = jax.tree.map(jnp.zeros_like, setting.template)
    plain = setting.lora.apply(setting.base, nothing, setting.ids[:, :-1])
    assert np.abs(plain - alone).max(axis=(1, 2)).min() > 1e-3, "the adapters change nothing"
    for call in calls:
        np.testing.assert_allclose(call(), alone, rtol=1e-5, atol=1e-5 * np.abs(alone).max())


def _check_memory(setting: Setting, count: int, whole: Call, *calls: Call) -> None:
    """The base is an argument once, and no array is as large as a kernel for each row."""
    ids, base, adapter = setting.ids[:, :-1], setting.base, setting.template
    arguments = _bytes(base) + count * _bytes(adapter) + ids.nbytes
    indices = 4 * len(ids)
    kernel = min(x.size for x in jax.tree.leaves(base) if x.ndim > 1)
    factors = len(ids) * max(x.size for x in jax.tree.leaves(adapter))
    largest = max(_largest(whole), factors)
    assert largest < len(ids) * kernel, "the model is too small to tell"
    for call in calls:
        given = call.compiled.memory_analysis().argument_size_in_bytes
        assert arguments <= given <= arguments + indices, f"{given} bytes of arguments"
        assert _largest(call) <= largest, f"an array of {_largest(call)} elements"
        limit = whole.temp + 2 * len(ids) * _bytes(adapter)
        assert call.temp <= limit, f"{call.temp} temporary bytes, more than {limit}"


# --------------------------------------------------------------------------------------- trees


def _nth(tree: Any, k: int) -> Any:
    return jax.tree.map(lambda x: x[k], tree)


def _bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def _largest(call: Call) -> int:
    """The number of elements of the largest array in a compiled program."""
    shapes = re.findall(r"[fi]\d+\[([\d,]+)\]", call.compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)
