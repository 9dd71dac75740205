"""Adapters that do not fit their base, trees that are none, and values that are not finite."""

import functools
import re
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from laws import assert_close
from small import (
    ADAPTED,
    PARAMS,
    X,
    array,
    dense,
    each_refusal,
    exactly,
    init,
    model,
    some_rows,
    swap,
)

import jlora
from jlora import Full, LoRA, Params

NOT_AT = "`adapter` does not fit `base` at {} of 3 paths:\n"
USE = "\nUse the adapter with the parameters that it was made for, or make one with `init`."
EXPECTED = "`adapter` must be a nested dict of LowRank nodes and arrays, as `init` returns it; got "


def at(count: int, *lines: str) -> str:
    """The message on misfits at some paths."""
    return NOT_AT.format(count) + "\n".join(f"  {line}" for line in lines) + USE


def base_with(path: str, leaf: Any) -> Any:
    """Another leaf in the base."""
    return lambda base, adapter: (swap(base, path, leaf), adapter)


def adapter_with(path: str, leaf: Callable[[Any], Any]) -> Any:
    """Another leaf in the adapter."""
    return lambda base, adapter: (base, swap(adapter, path, leaf(adapter)))


MISFITS = {
    at(1, "layer/kernel: not in `base`"): base_with("layer/kernel", None),
    at(
        1,
        "layer/kernel: a weight of shape (5, 6) needs A (5, 2) and B (2, 6), got (4, 2) and (2, 6)",
    ): base_with("layer/kernel", array(5, 6)),
    at(1, "layer/kernel: made for a weight of 2 axes, got one of shape (3, 4, 6) in `base`"): (
        base_with("layer/kernel", array(3, 4, 6))
    ),
    at(1, "fused: a weight of shape (6, 6) needs A (6, 2) and B (2, 6), got (6, 2) and (3, 6)"): (
        adapter_with("fused", lambda a: a["fused"]._replace(b=array(3, 6)))
    ),
    at(1, "fused: `a` must be an array, got NoneType"): (
        adapter_with("fused", lambda a: a["fused"]._replace(a=None))
    ),
    "`adapter` does not fit `base`: the paths of `adapter` begin with 'adapter/', those of "
    "`base` do not. Give both with it, as variables has it, or both without, as "
    "variables['adapter'].": lambda base, adapter: (base, {"adapter": adapter}),
    at(
        3,
        "fused: a weight of shape (6, 6) needs A (6, 2) and B (2, 6), got (2, 6, 2) and (2, 2, 6)",
        "layer/bias: expected shape (6,) as in `base`, got (2, 6)",
        "layer/kernel: a weight of shape (4, 6) needs A (4, 2) and B (2, 6), got (2, 4, 2) and "
        "(2, 2, 6)",
    ): lambda base, adapter: (base, jax.tree.map(lambda a: np.stack([a, a]), adapter)),
}
WRONG_TREES = {
    "`base` holds LowRank nodes, so it is an adapter, or a tree from `bind`: are `base` "
    "and `adapter` swapped?": lambda base, adapter: (adapter, base),
    f"{EXPECTED}the root: str.": lambda base, adapter: (base, "adapter.npz"),
    f"{EXPECTED}None, which holds none.": lambda base, adapter: (base, None),
    f"{EXPECTED}{{'w': {{}}}}, which holds none.": lambda base, adapter: (base, {"w": {}}),
    f"{EXPECTED}fused: float, layer/bias: int.": lambda base, adapter: (
        base,
        swap(swap(adapter, "fused", 1.5), "layer/bias", 0),
    ),
    f"{EXPECTED}fused: Adapted, layer/kernel: Adapted.": lambda base, adapter: (
        base,
        jlora.bind(base, adapter),
    ),
}


@functools.cache
def made() -> tuple[Any, Any]:
    """Base and adapter of two sites and a bias."""
    return init(*ADAPTED)


LORA = jlora.transform(model, *ADAPTED)
CALLS = {
    "bind": jlora.bind,
    "apply": lambda base, adapter: LORA.apply(base, adapter, X),
    "merge": jlora.merge,
    "unmerge": jlora.unmerge,
    "jit-apply": lambda base, adapter: jax.jit(LORA.apply)(base, adapter, X),
    "jit-merge": lambda base, adapter: jax.jit(jlora.merge)(base, adapter),
}


ROWS = [(p, ValueError, m, call) for m, p in MISFITS.items() for call in CALLS]
ROWS += [(p, TypeError, m, call) for m, p in WRONG_TREES.items() for call in list(CALLS)[:4]]
# Each message of the shared check, and each caller, every day; and what trains nothing, which
# must not pass as the base model.
FIRST = next(iter(MISFITS))
DAILY = [x for x in ROWS if x[2] == FIRST or x[3] == "bind" or "None" in x[2]]


@pytest.mark.parametrize(("provoke", "error", "message", "call"), some_rows(ROWS, *DAILY))
def test_adapter_does_not_fit(provoke: Any, error: Any, message: str, call: str) -> None:
    """Every differing path once, whoever takes the two trees; and trees that are none."""
    base, adapter = provoke(*made())
    with pytest.raises(error, match=exactly(message)):
        CALLS[call](base, adapter)


def test_optimizer_never_trains_the_base() -> None:
    """Whatever holds a base and an adapter, the base gets no updates."""
    base, adapter = made()
    params = {"m": [Params(base, adapter)] * 2, "bound": jlora.bind(base, adapter)}
    tx = jlora.optimizer(optax.sgd(1.0))
    updates, _ = tx.update(jax.tree.map(np.ones_like, params), tx.init(params), params)
    for found in (*(x.base for x in updates["m"]), updates["bound"]["fused"].base):
        assert not any(np.any(u) for u in jax.tree.leaves(found) if u.dtype == jnp.float32)


ARRAY_AT = (
    "`tree` must be an adapter, a nested dict, or jlora.Params(base, adapter), but has an array at "
)
HELD = {
    # A bare pair of base and adapter does not say which of the two is which.
    f"{ARRAY_AT}\"[0]['bucket']\". Put base and adapter into Params, so that the base stays "
    "frozen.": lambda: made(),
    # In the state of a module no node says which arrays are A and B.
    f"{ARRAY_AT}\"['w'].value\". For nnx.Optimizer(model, tx, wrt=nnx.LoRAParam), whose tree is "
    "the adapter alone, give `tx` itself.": (
        lambda: nnx.state(nnx.Dict(w=nnx.LoRAParam(X)), nnx.LoRAParam)
    ),
    **{
        "`tree` must be an adapter or jlora.Params(base, adapter), but is a dict of both: at "
        f"{name!r} are arrays alone, which would be trained, at the paths of the adapter beside "
        "them. Give jlora.Params(base, adapter).": (
            lambda name=name: {name: made()[0], "adapter": made()[1]}
        )
        for name in ("base", "params")
    },
}


@each_refusal({TypeError: HELD})
def test_optimizer_refuses_a_base_that_it_would_train(
    provoke: Any, error: Any, message: str
) -> None:
    tree = provoke()
    for call in ("labels", "optimizer", "train-state"):
        with pytest.raises(error, match=exactly(message)):
            LABELING[call](tree)


PLAIN: dict[str, Callable[[], Any]] = {
    "parameters": lambda: PARAMS,
    "one-array": lambda: X,
    "frozen-dict": lambda: flax.core.freeze(PARAMS),
    "shapes": lambda: jax.eval_shape(lambda: PARAMS),
    # An adapter of `Full` leaves alone looks like parameters.
    "bound-to-nothing": lambda: jlora.bind(PARAMS, init(Full("layer/kernel"))[1]),
}
SGD = optax.sgd(1.0)
LABELING: dict[str, Callable[[Any], Any]] = {
    "labels": jlora.labels,
    "mask": jlora.mask,
    "optimizer": jlora.optimizer(SGD).init,
    "chained": jlora.optimizer(
        optax.chain(jlora.precondition(1e-6), SGD, jlora.lora_plus(4.0))
    ).init,
    "train-state": lambda params: TrainState.create(
        apply_fn=model, params=params, tx=jlora.optimizer(SGD)
    ),
    "shapes": lambda params: jax.eval_shape(jlora.optimizer(SGD).init, params),
    "partition": optax.partition({"full": SGD, "base": optax.set_to_zero()}, jlora.labels).init,
}


@pytest.mark.parametrize(
    ("call", "tree"),
    some_rows(
        [(call, tree) for call in LABELING for tree in PLAIN],
        *[("labels", tree) for tree in PLAIN],
        *[(call, "parameters") for call in LABELING],
    ),
)
def test_parameters_are_no_adapter(call: str, tree: str) -> None:
    """All of them would be trained, as if they were an adapter of `Full` leaves alone."""
    message = (
        "`tree` must be an adapter or jlora.Params(base, adapter), but has arrays alone, as a "
        "model's parameters have, all of which would be trained. Give the adapter that `init` "
        "returned. If it is one, of jlora.Full leaves alone, give `tx` itself, or "
        "jlora.Params({}, adapter)."
    )
    with pytest.raises(TypeError, match=exactly(message)):
        LABELING[call](PLAIN[tree]())


def test_an_optimizer_for_some_leaves() -> None:
    """A part of an adapter may have arrays alone, where something else chose it."""
    _, adapter = made()
    kinds = jax.tree.map(lambda x: "full" if x == "full" else "low rank", jlora.labels(adapter))
    tx = optax.partition({"full": jlora.optimizer(SGD), "low rank": jlora.optimizer(SGD)}, kinds)
    updates, _ = tx.update(adapter, tx.init(adapter), adapter)
    assert_close(updates, jax.tree.map(lambda x: -x, adapter), 1e-5)


def test_an_adapter_of_full_leaves_alone() -> None:
    """It trains in `Params`, with its base or without, as by the optimizer itself."""
    base, adapter = init(Full("layer/kernel"))
    assert jlora.labels(jlora.Params({}, adapter)).adapter == {"layer": {"kernel": "full"}}
    sgd = optax.sgd(0.1, momentum=0.9)
    expected, _ = sgd.update(adapter, sgd.init(adapter))
    for tree in (jlora.Params({}, adapter), jlora.Params(base, adapter)):
        tx = jlora.optimizer(optax.chain(jlora.precondition(1e-6), sgd, jlora.lora_plus(4)))
        updates, _ = tx.update(tree, tx.init(tree), tree)
        assert_close(updates.adapter, expected, 1e-5)
    assert jlora.labels({}) == {}  # there is nothing that could be trained


def test_merge_check_names_paths() -> None:
    """Every leaf with NaN or infinity, and how many; nothing without `check`, or if all is well."""
    base, adapter = made()
    assert jlora.merge(base, adapter, check=True)
    bias, fused = (np.array(x) for x in (adapter["layer"]["bias"], adapter["fused"].b))
    bias[2], fused[:, 1] = np.nan, np.inf
    broken = swap(adapter, "layer/bias", bias)
    broken = swap(broken, "fused", adapter["fused"]._replace(b=jnp.asarray(fused)))
    assert jax.tree.structure(jlora.merge(base, broken)) == jax.tree.structure(base)
    message = (
        "`merge` gave values that are not finite at:\n"
        "  fused: 6 of 36 values\n"
        "  layer/bias: 1 of 6 values\n"
        "The adapter or the base holds NaN or infinity there; use an earlier checkpoint."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        jlora.merge(base, broken, check=True)
    # Finite factors whose sum with W is not finite in W's dtype.
    params = {"w": jnp.full((4, 6), 6e4, jnp.float16)}
    base, adapter = init(LoRA("w", rank=2), apply=dense, params=params)
    big = jax.tree.map(lambda a: jnp.full_like(a, 100.0), adapter)
    with pytest.raises(ValueError, match=re.escape("\n  w: 24 of 24 values\n")):
        jlora.merge(base, big, check=True)
