"""Adapters that do not fit their base, trees that are none, and values that are not finite."""

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
from small import (
    ADAPTED,
    PARAMS,
    W,
    X,
    array,
    assert_same,
    dense,
    each_refusal,
    exactly,
    init,
    model,
    swap,
)

import jlora
from jlora import Full, LoRA, Params

ONE = "`adapter` does not fit `base` at 1 of 3 paths:\n"
USE = "Use the adapter with the parameters that it was made for, or make one with `init`."


MISFITS = {
    f"{ONE}  layer/kernel: not in `base`\n{USE}": lambda base, adapter: (
        swap(base, "layer/kernel", None),
        adapter,
    ),
    f"{ONE}  layer/kernel: a weight of shape (5, 6) needs A (5, 2) and B (2, 6), got (4, 2) and "
    f"(2, 6)\n{USE}": lambda base, adapter: (swap(base, "layer/kernel", array(5, 6)), adapter),
    f"{ONE}  layer/kernel: made for a weight of 2 axes, got one of shape (3, 4, 6) in "
    f"`base`\n{USE}": lambda base, adapter: (swap(base, "layer/kernel", array(3, 4, 6)), adapter),
    f"{ONE}  layer/bias: expected shape (7,) as in `base`, got (6,)\n{USE}": lambda base, adapter: (
        swap(base, "layer/bias", array(7)),
        adapter,
    ),
    f"{ONE}  fused: a weight of shape (6, 6) needs A (6, 2) and B (2, 6), got (4, 2) and (2, 6)\n"
    + USE: lambda base, adapter: (base, swap(adapter, "fused", adapter["layer"]["kernel"])),
    f"{ONE}  fused: a weight of shape (6, 6) needs A (6, 2) and B (2, 6), got (6, 2) and (3, 6)\n"
    + USE: lambda base, adapter: (
        base,
        swap(adapter, "fused", adapter["fused"]._replace(b=array(3, 6))),
    ),
    "`adapter` does not fit `base`: the paths of `adapter` begin with 'adapter/', those of "
    "`base` do not. Give both with it, as variables has it, or both without, as "
    "variables['adapter'].": lambda base, adapter: (base, {"adapter": adapter}),
    "`adapter` does not fit `base` at 3 of 3 paths:\n"
    "  fused: a weight of shape (2, 2) needs A (2, 2) and B (2, 2), got (6, 2) and (2, 6)\n"
    "  layer/bias: expected shape (6, 6) as in `base`, got (6,)\n"
    f"  layer/kernel: not in `base`\n{USE}": lambda base, adapter: (
        {"fused": array(2, 2), "layer": {"bias": base["fused"]}},
        adapter,
    ),
    "`adapter` does not fit `base` at 3 of 3 paths:\n"
    "  fused: a weight of shape (6, 6) needs A (6, 2) and B (2, 6), got (2, 6, 2) and "
    "(2, 2, 6)\n"
    "  layer/bias: expected shape (6,) as in `base`, got (2, 6)\n"
    "  layer/kernel: a weight of shape (4, 6) needs A (4, 2) and B (2, 6), got (2, 4, 2) and "
    f"(2, 2, 6)\n{USE}": lambda base, adapter: (
        base,
        jax.tree.map(lambda a: jnp.stack([a, a]), adapter),
    ),
}

WRONG_TREES = {
    "`base` holds LowRank nodes, so it is an adapter, or a tree from `bind`: are `base` "
    "and `adapter` swapped?": lambda base, adapter: (adapter, base),
    "`adapter` must be a nested dict of LowRank nodes and arrays, as `init` returns it; "
    "got the root: str.": lambda base, adapter: (base, "adapter.npz"),
    "`adapter` must be a nested dict of LowRank nodes and arrays, as `init` returns it; "
    "got fused: str.": lambda base, adapter: (base, swap(adapter, "fused", "fused.npz")),
    "`adapter` must be a nested dict of LowRank nodes and arrays, as `init` returns it; "
    "got fused: float, layer/bias: int.": lambda base, adapter: (
        base,
        swap(swap(adapter, "fused", 1.5), "layer/bias", 0),
    ),
    "`adapter` must be a nested dict of LowRank nodes and arrays, as `init` returns it; "
    "got fused: Adapted, layer/kernel: Adapted.": lambda base, adapter: (
        base,
        jlora.bind(base, adapter),
    ),
}


LORA = jlora.transform(model, *ADAPTED)
CALLS = {
    "apply": lambda base, adapter: LORA.apply(base, adapter, X),
    "bind": jlora.bind,
    "merge": jlora.merge,
    "unmerge": jlora.unmerge,
}
JITTED = {
    "jit-apply": lambda base, adapter: jax.jit(LORA.apply)(base, adapter, X),
    "jit-merge": lambda base, adapter: jax.jit(jlora.merge)(base, adapter),
}


@each_refusal({ValueError: MISFITS})
@pytest.mark.parametrize("call", [*CALLS, *JITTED])
def test_adapter_does_not_fit(provoke: Any, error: Any, message: str, call: str) -> None:
    """Every differing path once, whoever takes the two trees."""
    base, adapter = provoke(*init(*ADAPTED))
    with pytest.raises(error, match=exactly(message)):
        (CALLS | JITTED)[call](base, adapter)


@each_refusal({TypeError: WRONG_TREES})
@pytest.mark.parametrize("call", list(CALLS))
def test_wrong_tree(provoke: Any, error: Any, message: str, call: str) -> None:
    """A tree that is no adapter, or the two in the wrong order."""
    base, adapter = provoke(*init(*ADAPTED))
    with pytest.raises(error, match=exactly(message)):
        CALLS[call](base, adapter)


@pytest.mark.parametrize("adapter", [None, {"w": None}, {"w": {}}, []], ids=repr)
@pytest.mark.parametrize("call", ["apply", "merge"])
def test_adapter_of_nothing(adapter: Any, call: str) -> None:
    """None is no adapter: a checkpoint that was not found must not pass as the base model."""
    base, _ = init(LoRA("w", rank=2), apply=dense, params=W)
    with pytest.raises(TypeError, match="`adapter` must be a nested dict"):
        if call == "apply":
            jlora.transform(dense).apply(base, adapter, X)
        else:
            jlora.merge(base, adapter)


TREES = [
    pytest.param(
        lambda base, adapter: {"m": Params(base, adapter)}, lambda t: t["m"].base, id="nested"
    ),
    pytest.param(
        lambda base, adapter: [Params(base, adapter)] * 2, lambda t: t[0].base, id="two-models"
    ),
    pytest.param(jlora.bind, lambda t: t["fused"].base, id="bound"),
]


@pytest.mark.parametrize(("tree", "base_of"), TREES)
def test_optimizer_never_trains_the_base(
    tree: Callable[..., Any], base_of: Callable[[Any], Any]
) -> None:
    """Whatever holds a base and an adapter, the base gets no updates."""
    params = tree(*init(*ADAPTED))
    tx = jlora.optimizer(optax.sgd(1.0))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    floats = [u for u in jax.tree.leaves(base_of(updates)) if u.dtype == jnp.float32]
    assert not any(np.any(u) for u in floats)


def test_optimizer_refuses_what_init_returns() -> None:
    """A bare pair of base and adapter does not say which of the two is which."""
    params = init(*ADAPTED)
    message = (
        "`tree` must be an adapter, a nested dict, or jlora.Params(base, adapter), but has an "
        "array at \"[0]['bucket']\". Put base and adapter into Params, so that the base stays "
        "frozen."
    )
    with pytest.raises(TypeError, match=exactly(message)):
        jlora.optimizer(optax.sgd(1.0)).init(params)


def test_optimizer_refuses_the_state_of_a_module() -> None:
    """In it no node says which arrays are A and B; and it needs none, as the base is not there."""
    state = nnx.state(nnx.Dict(w=nnx.LoRAParam(X)), nnx.LoRAParam)
    message = (
        "`tree` must be an adapter, a nested dict, or jlora.Params(base, adapter), but has an "
        "array at \"['w'].value\". For nnx.Optimizer(model, tx, wrt=nnx.LoRAParam), whose tree is "
        "the adapter alone, give `tx` itself."
    )
    with pytest.raises(TypeError, match=exactly(message)):
        jlora.optimizer(optax.sgd(1.0)).init(state)


def fully_trained() -> Any:
    """An adapter of `Full` leaves alone, which looks like parameters."""
    return init(Full("layer/kernel"))[1]


PLAIN: dict[str, Callable[[], Any]] = {
    "parameters": lambda: PARAMS,
    "one-array": lambda: X,
    "frozen-dict": lambda: flax.core.freeze(PARAMS),
    "shapes": lambda: jax.eval_shape(lambda: PARAMS),
    "full-alone": fully_trained,
    "bound-to-nothing": lambda: jlora.bind(PARAMS, fully_trained()),
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


@pytest.mark.parametrize("tree", list(PLAIN))
@pytest.mark.parametrize("call", list(LABELING))
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


@pytest.mark.parametrize("name", ["base", "params"])
@pytest.mark.parametrize("call", ["labels", "optimizer", "train-state"])
def test_a_base_beside_its_adapter(call: str, name: str) -> None:
    """In one dict, where nothing says which is which, the base would be trained too."""
    base, adapter = init(*ADAPTED)
    message = (
        "`tree` must be an adapter or jlora.Params(base, adapter), but is a dict of both: at "
        f"{name!r} are arrays alone, which would be trained, at the paths of the adapter beside "
        "them. Give jlora.Params(base, adapter)."
    )
    with pytest.raises(TypeError, match=exactly(message)):
        LABELING[call]({name: base, "adapter": adapter})


def test_an_optimizer_for_some_leaves() -> None:
    """A part of an adapter may have arrays alone, where something else chose it."""
    _, adapter = init(*ADAPTED)
    kinds = jax.tree.map(lambda x: "full" if x == "full" else "low rank", jlora.labels(adapter))
    tx = optax.partition({"full": jlora.optimizer(SGD), "low rank": jlora.optimizer(SGD)}, kinds)
    updates, _ = tx.update(adapter, tx.init(adapter), adapter)
    assert_same(updates, jax.tree.map(lambda x: -x, adapter))


def test_an_adapter_of_full_leaves_alone() -> None:
    """It trains in `Params`, with its base or without, as by the optimizer itself."""
    base, adapter = init(Full("layer/kernel"))
    assert jlora.labels(jlora.Params({}, adapter)).adapter == {"layer": {"kernel": "full"}}
    expected, _ = optax.adam(0.1).update(adapter, optax.adam(0.1).init(adapter))
    for tree in (jlora.Params({}, adapter), jlora.Params(base, adapter)):
        tx = jlora.optimizer(optax.adam(0.1))
        updates, _ = tx.update(tree, tx.init(tree), tree)
        assert_same(updates.adapter, expected)
    assert jlora.labels({}) == {}  # there is nothing that could be trained


def test_merge_check_names_paths() -> None:
    """Every leaf with NaN or infinity, and how many; nothing without `check`, or if all is well."""
    base, adapter = init(*ADAPTED)
    assert jlora.merge(base, adapter, check=True)
    broken = swap(adapter, "layer/bias", adapter["layer"]["bias"].at[2].set(jnp.nan))
    fused = adapter["fused"]
    broken = swap(broken, "fused", fused._replace(b=fused.b.at[:, 1].set(jnp.inf)))
    assert jax.tree.structure(jlora.merge(base, broken)) == jax.tree.structure(base)
    message = (
        "`merge` gave values that are not finite at:\n"
        "  fused: 6 of 36 values\n"
        "  layer/bias: 1 of 6 values\n"
        "The adapter or the base holds NaN or infinity there; use an earlier checkpoint."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        jlora.merge(base, broken, check=True)


def test_merge_check_sees_overflow() -> None:
    """Finite factors whose sum with W is not finite in W's dtype."""
    params = {"w": jnp.full((4, 6), 6e4, jnp.float16)}
    base, adapter = init(LoRA("w", rank=2), apply=dense, params=params)
    big = jax.tree.map(lambda a: jnp.full_like(a, 100.0), adapter)
    with pytest.raises(ValueError, match=re.escape("\n  w: 24 of 24 values\n")):
        jlora.merge(base, big, check=True)
