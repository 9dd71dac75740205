"""Trees and arguments that do not fit: each is named, and what other libraries raise arrives."""

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
from flax import linen as nn
from flax import nnx
from flax.errors import FlaxError
from flax.training.train_state import TrainState
from laws import assert_close
from small import (
    ADAPTED,
    KEY,
    PARAMS,
    W,
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
    "`adapter` does not fit `base`: the paths of `adapter` begin with 'adapter/', but the paths of "
    "`base` do not. Give both with it, like `variables`, or both without it, like "
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
    "`adapter` must be a nested dict of LowRank nodes and arrays; got a tree from `bind`. Give "
    "the adapter in it.": lambda base, adapter: (base, jlora.bind(base, adapter)),
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
    f"{ARRAY_AT}\"['w'].value\". nnx.Optimizer(model, tx, wrt=nnx.LoRAParam) trains only the "
    "adapter anyway: give it `tx` without jlora.optimizer.": (
        lambda: nnx.state(nnx.Dict(w=nnx.LoRAParam(X)), nnx.LoRAParam)
    ),
    **{
        "`tree` must be an adapter or jlora.Params(base, adapter), but it is a dict of both: the "
        f"base at {name!r} would be trained too. Give jlora.Params(base, adapter).": (
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
        "`tree` must be an adapter or jlora.Params(base, adapter), but it has only arrays, like a "
        "model's parameters: all of them would be trained. Give the adapter that `init` returned. "
        "If it is an adapter of jlora.Full leaves only, use `tx` without jlora.optimizer, or give "
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
        "`merge` computed values that are not finite at:\n"
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


# ------------------------------------------------------------------------- other arguments

ARRAY = "an array of float32 and shape (4, 6)"
KEYS_OF_SEVERAL = "an array of key<fry> and shape (2,)"
KEY_IS = "`key` must be one PRNG key, such as jax.random.key(0); got "
CHECK = (
    "`check` of merge needs concrete values, which jit, grad and vmap do not have. Merge without "
    "`check` there, and check the result outside."
)
FORGOTTEN = (
    "`adapter` must be a nested dict of LowRank nodes and arrays, as `init` returns it, with paths "
    "of `base`; got the root: float32[2,4]. Was it forgotten, as in apply(base, x) instead of "
    "apply(base, adapter, x)? For the base model, give {}."
)
WRONG: dict[type[Exception], dict[str, Any]] = {
    TypeError: {
        f"{KEY_IS}int.": lambda: init_by(0),
        f"{KEY_IS}dict.": lambda: jlora.transform(dense, LoRA("w")).init(W, KEY, X),
        f"{KEY_IS}NoneType.": lambda: jlora.dropout(made()[1], None),
        f"{KEY_IS}{ARRAY}.": lambda: jlora.dropout(made()[1], W["w"]),
        f"{KEY_IS}{KEYS_OF_SEVERAL}.": (lambda: jlora.dropout(made()[1], jax.random.split(KEY, 2))),
        FORGOTTEN: lambda: jlora.transform(dense).apply(W, X),
        next(iter(WRONG_TREES)): lambda: jlora.merge(jlora.bind(*made()), made()[1]),
    },
    ValueError: {
        CHECK: lambda: jax.jit(lambda a: jlora.merge(PARAMS, a, check=True))(made()[1]),
        "`rank` of LoRA('') is 9, above min(inputs, outputs) = 4 of the root with shape (4, 6). "
        "Lower the rank, or put a separate rule for this leaf first, such as jlora.Full('').": (
            lambda: init(LoRA("", rank=9), apply=lambda w, x: x @ w, params=W["w"])
        ),
    },
}


@each_refusal(WRONG)
def test_wrong_argument(provoke: Any, error: type[Exception], message: str) -> None:
    """The argument or the path is named."""
    with pytest.raises(error, match=exactly(message)):
        provoke()


BASE = "`base` must be the frozen tree alone; got "
ADAPTER = "`adapter` must be a nested dict of LowRank nodes and arrays; got "
ROWS = [jlora.peft.Name("(.*)/kernel", r"\1", "io")]
PAIRS = {
    "apply": (lambda x: jlora.transform(model).apply(x, X), BASE),
    "apply-base": (lambda x: jlora.transform(model).apply(x, {}, X), BASE),
    "apply-adapter": (lambda x: jlora.transform(model).apply(PARAMS, x, X), ADAPTER),
    "merge-base": (lambda x: jlora.merge(x, made()[1]), BASE),
    "merge-adapter": (lambda x: jlora.merge(PARAMS, x), ADAPTER),
    "bind": (lambda x: jlora.bind(x, {}), BASE),
    "dropout": (lambda x: jlora.dropout(x, KEY), ADAPTER),
    "specs-base": (lambda x: jlora.sharding.specs(x, made()[1]), BASE),
    "specs-adapter": (lambda x: jlora.sharding.specs(PARAMS, x), ADAPTER),
    "arithmetic": (lambda x: jlora.arithmetic.add([x, x]), ADAPTER),
    "many": (lambda x: jlora.many.stack([x, x]), ADAPTER),
    "checkpoint": (lambda x: jlora.checkpoint.save("nowhere", x, ()), ADAPTER),
    "peft-base": (lambda x: jlora.peft.save("nowhere", x, made()[1], ROWS), BASE),
    "peft-adapter": (lambda x: jlora.peft.save("nowhere", PARAMS, x, ROWS), ADAPTER),
}
UNPACK = "the pair that `init` returns. Unpack it: base, adapter = lora.init(...)."
APART = "Params. Give its `base` and its `adapter` as two arguments."


@pytest.mark.parametrize("case", list(PAIRS))
def test_base_and_adapter_in_one(case: str) -> None:
    """A pair that was not unpacked, and Params, wherever one of both belongs."""
    provoke, start = PAIRS[case]
    for x, got in ((made(), UNPACK), (jlora.Params(*made()), APART)):
        with pytest.raises(TypeError, match=exactly(start + got)):
            provoke(x)


DRAWN = "`key` must be one PRNG key; got {} of flax.nnx. Give rngs.params()."
KEYS = {
    "init": (lambda key: init_by(key), DRAWN),
    "dropout": (lambda key: jlora.dropout(made()[1], key), DRAWN),
    "many": (
        lambda key: jlora.many.init(jlora.transform(dense, LoRA("w", rank=2)), key, W, X),
        "`keys` must be an array of PRNG keys, such as jax.random.split(key, 8); got {} of "
        "flax.nnx. Give rngs.params().",
    ),
}


def init_by(key: Any) -> Any:
    """`init` of one site."""
    return jlora.transform(dense, LoRA("w", rank=2)).init(key, W, X)


@pytest.mark.parametrize("case", list(KEYS))
def test_keys_of_nnx(case: str) -> None:
    """`nnx.Rngs` has every attribute; a key that it draws is taken."""
    provoke, message = KEYS[case]
    for rngs in (nnx.Rngs(0), nnx.Rngs(0).params):
        with pytest.raises(TypeError, match=exactly(message.format(type(rngs).__name__))):
            provoke(rngs)
    assert init_by(nnx.Rngs(0).params())


def test_a_collection_of_linen_variables() -> None:
    """Flax's own error arrives, with a note; the trees of `apply` and `merge` are compared."""
    module = nn.Dense(3)
    variables = module.init(KEY, X)
    for wrapped in (module.apply, jax.jit(module.apply), functools.partial(module.apply)):
        lora = jlora.transform(wrapped, LoRA("kernel", rank=2))
        for call in (
            lambda lora=lora: lora.init(KEY, variables["params"], X),
            lambda lora=lora: lora.sites(variables["params"], X),
            lambda lora=lora: lora.apply(variables["params"], {}, X),
        ):
            with pytest.raises(FlaxError, match="collection") as caught:
                call()
            assert caught.value.__notes__[-1] == (
                "jlora: Dense.apply needs the variables of model.init, a dict with the key "
                "'params'; got the keys 'kernel', 'bias'. Give variables, not variables['params']."
            )
    adapter = lora.init(KEY, variables, X)[1]
    message = (
        "`adapter` does not fit `base`: the paths of `{}` begin with 'params/', but the paths of "
        "`{}` do not. Give both with it, like `variables`, or both without it, like "
        "variables['params']."
    )
    for f, *args in ((lora.apply, X), (jlora.merge,)):
        with pytest.raises(ValueError, match=exactly(message.format("adapter", "base"))):
            f(variables["params"], adapter, *args)
        with pytest.raises(ValueError, match=exactly(message.format("base", "adapter"))):
            f(variables, adapter["params"], *args)


def test_parameters_that_are_not_the_first_argument() -> None:
    """The model's own error, with a note; and rules that match no path of an activation."""
    lora = jlora.transform(lambda x, params: x @ params["w"], LoRA("w", rank=2))
    for call in (lambda: lora.init(KEY, W, X), lambda: lora.sites(W, X)):
        with pytest.raises(TypeError, match="string index") as caught:
            call()
        assert caught.value.__notes__[-1] == (
            "jlora: jlora passes the parameters as the first argument of `apply_fn`, which is `x`. "
            "If the parameters are `params`, give jlora.transform a function that has them first, "
            "such as lambda params, x: apply_fn(x, params)."
        )
    message = (
        "LoRA('w') matches no leaf of `params`, which is one array of shape (2, 4). Are the "
        "arguments in the wrong order? The parameters come first: init(key, params, *args), and "
        "apply_fn(params, *args)."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        lora.init(KEY, X, W)


def test_errors_of_the_model_pass() -> None:
    """What the user's own function raises arrives as it is, from each of the three."""

    class OwnError(Exception):
        pass

    def failing(p: Any, x: jax.Array, fail: bool) -> jax.Array:
        if fail:
            raise OwnError("mine")
        return x @ p["w"]

    lora = jlora.transform(failing, LoRA("w", rank=2))
    base, adapter = lora.init(KEY, W, X, False)
    keys = jlora.transform(lambda p, params: p["v"] @ params, LoRA("w", rank=2))
    with pytest.raises(KeyError) as caught:
        keys.init(KEY, W, X)
    assert not any("jlora" in note for note in getattr(caught.value, "__notes__", ()))
    for call in (
        lambda: lora.init(KEY, W, X, True),
        lambda: lora.sites(W, X, fail=True),
        lambda: lora.apply(base, adapter, X, True),
    ):
        with pytest.raises(OwnError, match=exactly("mine")):
            call()
