"""What the tests of refusals share: small models and trees, and what is said of a mistake."""

import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import Frozen, Full, LoRA

KEY = jax.random.key(0)


def without_progress(stderr: str) -> str:
    """Drops the lines that a command writes every ten seconds, here where the machine is slow."""
    return re.sub(r"^\w+: +\d+% .*\[\d\d:.*\]\n", "", stderr, flags=re.M)


def as_jax(x: Any, dtype: Any = None) -> jax.Array:
    """The array on the device; `jnp.asarray` would compile a program for each shape."""
    return jax.device_put(np.asarray(x, dtype))


def array(*shape: int) -> jax.Array:
    """Normal values, the same for the same shape."""
    return as_jax(np.random.default_rng(shape).standard_normal(shape), np.float32)


def normal(seed: int, *shape: int, dtype: Any = None) -> jax.Array:
    """Standard normal numbers, of the session's width of floats if no dtype is given."""
    draw = np.random.default_rng(seed).standard_normal(shape)
    return as_jax(draw, dtype or jnp.result_type(float))


X = array(2, 4)
PARAMS = {
    "layer": {"kernel": array(4, 6), "bias": array(6), "scale": array(6)},
    "fused": array(6, 6),
    "position": array(2, 6),
    "unused": array(3, 5),
    "bucket": jnp.ones((3, 3), jnp.int32),
    "vocabulary": array(9, 4),
}


def model(params: Any, x: jax.Array) -> jax.Array:
    """Two dense sites, a lookup, a bias, a norm scale, an added position; two leaves unused."""
    p = params["layer"]
    y = (x + params["vocabulary"][jnp.array([1, 2])]) @ p["kernel"] + p["bias"]
    return (y + params["position"]) * p["scale"] @ params["fused"]


def dense(params: Any, x: jax.Array) -> jax.Array:
    """The smallest model: one product."""
    return x @ params["w"]


W = {"w": array(4, 6)}
SQUARE = {"w": array(4, 4)}


def init(*rules: Any, apply: Callable[..., Any] = model, params: Any = None) -> tuple[Any, Any]:
    """`init` of the given model under `rules`."""
    return jlora.transform(apply, *rules).init(KEY, PARAMS if params is None else params, X)


def randomize(adapter: Any) -> Any:
    """Every leaf plus noise, so that B is not zero."""
    rng = np.random.default_rng(0)

    def noisy(x: Any) -> jax.Array:
        sums = np.asarray(x) + 0.3 * rng.standard_normal(x.shape)
        return as_jax(sums, x.dtype)

    return jax.tree.map(noisy, adapter)


def set_up(apply: Any, rules: Any, params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
    """Transform, base and adapter of a model under one rule or several."""
    lora = jlora.transform(apply, *(rules if isinstance(rules, list | tuple) else [rules]))
    return lora, *lora.init(KEY, params, *args, **kwargs)


def set_up_noisy(*args: Any) -> tuple[Any, Any, Any]:
    """The same with noise on every leaf of the adapter, so that B is not zero."""
    lora, base, adapter = set_up(*args)
    return lora, base, randomize(adapter)


def some(rows: Iterable[Any], *daily: Any) -> list[Any]:
    """The values of one parameter, of which all but `daily` are for the long run."""
    rows = list(rows)
    assert all(x in rows for x in daily), daily
    return [x if x in daily else pytest.param(x, marks=pytest.mark.slow) for x in rows]


def some_rows(rows: Iterable[tuple[Any, ...]], *daily: tuple[Any, ...]) -> list[Any]:
    """The values of several parameters, of which all but `daily` are for the long run."""
    rows, marks = list(rows), pytest.mark.slow
    assert all(x in rows for x in daily), daily
    return [pytest.param(*x, marks=() if x in daily else marks) for x in rows]


def every(*axes: Iterable[Any], daily: Iterable[tuple[Any, ...]]) -> list[Any]:
    """All combinations of the values of several parameters, likewise."""
    return some_rows(itertools.product(*axes), *daily)


REMEDY = (
    "Narrow the pattern, train the leaf in full with jlora.Full, or give LoRA(..., "
    "materialize=True), which forms W + ΔW there: exact, but at full memory and time."
)


def line_of(f: Callable[..., Any], mark: str) -> str:
    """`file:line` of the only line of `f` that has `mark` in it."""
    lines, start = inspect.getsourcelines(f)
    [found] = [start + i for i, line in enumerate(lines) if mark in line]
    return f"{inspect.getsourcefile(f)}:{found}"


def assert_close(
    actual: Any, expected: Any, tolerance: float = 1e-5, law: str = "", least: float = 1e-6
) -> None:
    """Equal structures; floating leaves within `tolerance` of their scale, others equal.

    The scale is the largest finite entry of a leaf, and at least `least`.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected), law
    flat, _ = jax.tree_util.tree_flatten_with_path(expected)
    for (path, x), y in zip(flat, jax.tree.leaves(actual), strict=True):
        where = f"{law} {jax.tree_util.keystr(path)}"
        if not isinstance(x, jax.Array | np.ndarray):
            assert y == x, where
            continue
        assert y.shape == x.shape, where
        assert y.dtype == x.dtype, where
        if is_key(x):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        x, y = (np.asarray(v, np.result_type(v.dtype, np.float64)) for v in (x, y))
        scale = max(np.max(np.abs(x), initial=0.0, where=np.isfinite(x)), least, 1e-6)
        np.testing.assert_allclose(y / scale, x / scale, rtol=0, atol=tolerance, err_msg=where)


def is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def raw(tree: Any) -> list[bytes]:
    """The bytes of every leaf, so that zeros of different signs differ; and NaNs."""
    leaves = (jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(tree))
    return [np.asarray(x).tobytes() for x in leaves]


ADAPTED = (LoRA("kernel|fused", rank=2), Full("bias"), Frozen("vocabulary|bucket"))


def swap(tree: Mapping[str, Any], path: str, leaf: Any) -> dict[str, Any]:
    """`tree` with another leaf at `path`; without it for `leaf=None`."""
    head, _, tail = path.partition("/")
    if tail:
        return {**tree, head: swap(tree[head], tail, leaf)}
    rest = {k: v for k, v in tree.items() if k != head}
    return rest if leaf is None else {**rest, head: leaf}


def use_sin(p: Any, x: jax.Array) -> Any:
    """Element for element."""
    return x @ jnp.sin(p["w"])  # here
