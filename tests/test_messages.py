"""What a user reads: where something is given in a wrong place, and what `print` shows."""

import copy
import functools
import pickle
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jlora
from jlora import Full, LoRA

KEY = jax.random.key(0)
X = jnp.ones((1, 4))


def dense(params: Any, x: jax.Array) -> jax.Array:
    """The smallest model."""
    return x @ params["w"]


W = {"w": jnp.arange(12.0).reshape(4, 3)}


def exactly(message: str) -> str:
    """A pattern for `message` as a whole, with or without JAX's note on tracebacks."""
    return r"\A" + re.escape(message) + r"(\n-+\nFor simplicity, JAX has removed .*)?\Z"


# ------------------------------------------------------------------- a bound tree without `wrap`

BOUND = (
    "`params` is a tree from jlora.bind, with adapters beside its weights, which only a function "
    "under jlora.wrap takes: call jlora.wrap(model.apply)(params, ...) in the place of "
    "model.apply(params, ...), or lora.apply(base, adapter, ...)."
)


def bound(fn: Callable[..., Any], params: Any, *args: Any) -> Any:
    """The tree of `fn` with an adapter at every matrix in it."""
    return jlora.bind(*jlora.transform(fn, LoRA(".", rank=1)).init(KEY, params, *args))


def linen(module: nn.Module, x: jax.Array) -> tuple[Callable[..., Any], Any]:
    """A module's apply function, and a tree that it cannot take."""
    return module.apply, bound(module.apply, module.init(KEY, x), x)


def linear() -> tuple[Callable[..., Any], Any]:
    """NNX through split and merge."""
    graph, params = nnx.split(nnx.Linear(4, 3, use_bias=False, rngs=nnx.Rngs(0)))
    fn = lambda params, x: nnx.merge(graph, params, copy=True)(x)  # noqa: E731
    return fn, bound(fn, params, X)


IDS = jnp.array([1, 2])
MODULES = {
    "dense": lambda: (*linen(nn.Dense(3, use_bias=False), X), X),
    "embed": lambda: (*linen(nn.Embed(4, 3), IDS), IDS),
    "conv": lambda: (*linen(nn.Conv(3, (2,), use_bias=False), X[None]), X[None]),
    "nnx": lambda: (*linear(), X),
    "nnx-module": lambda: (lambda m, x: m(x), nnx_module(), X),
}


def nnx_module() -> Any:
    """A module whose parameters are adapted in place."""
    module = nnx.Linear(4, 3, use_bias=False, rngs=nnx.Rngs(0))
    return bound(lambda m, x: m(x), module, X)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", list(MODULES))
def test_bound_tree_in_a_module(name: str, jit: bool) -> None:
    """`model.apply(jlora.bind(base, adapter), x)`: the message says what takes such a tree."""
    fn, params, x = MODULES[name]()
    assert jnp.isfinite(jlora.wrap(fn)(params, x)).all()
    with pytest.raises(TypeError, match=exactly(BOUND)):
        (jax.jit(fn) if jit else fn)(params, x)


USES: dict[str, Callable[[Any], Any]] = {
    "x @ w": lambda w: X @ w,
    "w @ x": lambda w: w @ X.T,
    "numpy": lambda w: np.ones((1, 4)) @ w,
    "dot": lambda w: jnp.dot(X, w),
    "lax.dot": lambda w: lax.dot(X, w),
    "einsum": lambda w: jnp.einsum("bi,io->bo", X, w),
    "take": lambda w: jnp.take(w, 0, axis=0),
    "row": lambda w: w[0],
    "rows": lambda w: w[IDS],
    "all": lambda w: w[...],
    "loop": lambda w: list(w),
    "scaled": lambda w: 2 * w,
    "divided": lambda w: w / 2,
    "negative": lambda w: -w,
    "sum": lambda w: w + 1,
    "difference": lambda w: 1 - w,
    "norm": lambda w: jnp.linalg.norm(w),
    "asarray": lambda w: jnp.asarray(w),
    "numpy.asarray": lambda w: np.asarray(w),
}


@pytest.mark.parametrize("use", list(USES))
def test_bound_leaf_is_no_array(use: str) -> None:
    """However a model takes hold of a weight."""
    with pytest.raises(TypeError, match=exactly(BOUND)):
        USES[use](bound(dense, W, X)["w"])


def test_bound_leaf_has_no_attributes_of_an_array() -> None:
    """`w.T`, `w.shape`; and what asks politely, as `hasattr` and copies do, gets an answer."""
    leaf = bound(dense, W, X)["w"]
    with pytest.raises(AttributeError, match=exactly(f"Adapted has no attribute 'T'. {BOUND}")):
        leaf.T  # noqa: B018
    assert not hasattr(leaf, "shape")
    for same in (copy.deepcopy(leaf), pickle.loads(pickle.dumps(leaf))):
        assert jax.tree.structure(same) == jax.tree.structure(leaf)


# -------------------------------------------------------------------------------- what is printed


def test_print_of_an_adapter() -> None:
    """A node is a line of shapes, with what is not as it is by default."""
    low_rank = LoRA("w", rank=2, alpha=3, dropout=0.5, materialize=True)
    _, adapter = jlora.transform(dense, low_rank).init(KEY, W, X)
    shown = "{'w': LowRank(a=float32[4,2], b=float32[2,3], scale=1.5, dropout=0.5, materialize=True"
    assert str(adapter) == shown + ")}"
    assert str(jlora.dropout(adapter, KEY)) == shown + ", key=key<fry>[])}"
    assert str(jax.eval_shape(lambda: adapter)) == str(adapter)


def test_print_of_stacks_and_slots() -> None:
    """Layers of a scan, and q and v of a fused kernel."""
    params = {"w": jnp.ones((5, 4, 12))}
    fn = lambda p, x: lax.scan(lambda x, w: (x, x @ w), x, p["w"])[1]  # noqa: E731
    lora = jlora.transform(fn, LoRA("w", rank=2, slots=jlora.Slots(3, (0, 2))))
    assert str(lora.init(KEY, params, X)[1]["w"]) == (
        "LowRank(a=float32[5,2,4,2], b=float32[5,2,2,4], scale=8.0, stack=(0,), "
        "slots=(3, (0, 2), 2))"
    )


def test_print_of_trees_of_an_adapters_structure() -> None:
    """Labels and tracers stand where arrays do."""
    base, adapter = jlora.transform(dense, LoRA("w", rank=2)).init(KEY, W, X)
    assert str(jlora.labels(adapter)) == "{'w': LowRank(a='a', b='b', scale=8.0)}"
    seen = []
    jax.jit(lambda a: seen.append(str(a)))(adapter)
    assert seen == [str(adapter)]
    assert str(jlora.bind(base, adapter)["w"]) == (
        "Adapted(base=float32[4,3], delta=LowRank(a=float32[4,2], b=float32[2,3], scale=8.0))"
    )


RULES = (LoRA("(query|value)/kernel", rank=4), Full("classifier"))
PRINTED = {
    "method": (nn.Dense(3).apply, "Dense.apply"),
    "function": (dense, "dense"),
    "partial": (functools.partial(nn.Dense(3).apply, mutable=["x"]), "partial(Dense.apply)"),
    "jitted": (jax.jit(dense), "dense"),
}


@pytest.mark.parametrize("case", list(PRINTED))
def test_print_of_a_transform(case: str) -> None:
    """The function and the rules on one line, where `sites` says what they are."""
    fn, name = PRINTED[case]
    sites = functools.partial(lambda *_: None, fn, RULES)
    assert str(jlora.Transformed(max, min, sites)) == (
        f"Transformed({name}, LoRA('(query|value)/kernel'), Full('classifier'))"
    )
