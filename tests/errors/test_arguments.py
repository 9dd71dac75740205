"""Trees and arguments that do not fit: each is named, and what other libraries raise arrives."""

import functools
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
from messages import all_refused, check_text, refused
from small import (
    ADAPTED,
    KEY,
    PARAMS,
    W,
    X,
    array,
    dense,
    init,
    model,
    set_up,
    some_rows,
    swap,
)

import jlora
from jlora import Full, LoRA, Params, checkpoint, peft


def base_with(path: str, leaf: Any) -> Any:
    """Another leaf in the base."""
    return lambda base, adapter: (swap(base, path, leaf), adapter)


def adapter_with(path: str, leaf: Callable[[Any], Any]) -> Any:
    """Another leaf in the adapter."""
    return lambda base, adapter: (base, swap(adapter, path, leaf(adapter)))


def stacked(tree: Any) -> Any:
    return jax.tree.map(lambda a: np.stack([a, a]), tree)


# Another base and adapter; the path, and of what is there.
MISFITS: dict[str, Any] = {
    "lacking": (base_with("layer/kernel", None), "layer/kernel", "not in `base`"),
    "shape": (base_with("layer/kernel", array(5, 6)), "layer/kernel", "got (4, 2) and (2, 6)"),
    "axes": (base_with("layer/kernel", array(3, 4, 6)), "layer/kernel", "got one of shape (3, 4, "),
    "B": (adapter_with("fused", lambda a: a["fused"]._replace(b=array(3, 6))), "fused", "d (3, 6)"),
    "no A": (adapter_with("fused", lambda a: a["fused"]._replace(a=None)), "fused", "got NoneType"),
    "below": (lambda base, a: (base, {"adapter": a}), "adapter/fused", "not in `base`"),
    "stacked": (lambda base, a: (base, stacked(a)), "layer/bias", "got (2, 6)"),
}  # fmt: skip
# The argument, and of what was got.
WRONG_TREES: dict[str, Any] = {
    "swapped": (lambda base, a: (a, base), "base", "", "holds LowRank nodes", "swapped"),
    "text": (lambda base, a: (base, "adapter.npz"), "adapter", "the root", "got the root: str."),
    "none": (lambda base, a: (base, None), "adapter", "", "got None, which holds none."),
    "empty": (lambda base, a: (base, {"w": {}}), "adapter", "", "got {'w': {}}, which holds none."),
    "numbers": (
        lambda base, a: (base, swap(swap(a, "fused", 1.5), "layer/bias", 0)),
        *("adapter", "layer/bias", "got fused: float, layer/bias: int."),
    ),
    "bound": (
        lambda base, a: (base, jlora.bind(base, a)), "adapter", "", "from `bind`", "Give the a"
    ),
}  # fmt: skip


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


UNFIT = {case: (ValueError, f, ("adapter", *facts)) for case, (f, *facts) in MISFITS.items()}
UNFIT |= {case: (TypeError, f, facts) for case, (f, *facts) in WRONG_TREES.items()}
ROWS = [(case, call) for case in MISFITS for call in CALLS]
ROWS += [(case, call) for case in WRONG_TREES for call in list(CALLS)[:4]]
# Each message of the shared check, and each caller, every day; and what trains nothing, which
# must not pass as the base model.
DAILY = [x for x in ROWS if x[0] in ("lacking", "none", "empty") or x[1] == "bind"]


@pytest.mark.parametrize(("case", "call"), some_rows(ROWS, *DAILY))
def test_adapter_does_not_fit(case: str, call: str) -> None:
    """Every differing path once, whoever takes the two trees; and trees that are none."""
    error, change, facts = UNFIT[case]
    trees = change(*made())
    with refused(error, *facts, case=case):
        CALLS[call](*trees)


def test_optimizer_never_trains_the_base() -> None:
    """Whatever holds a base and an adapter, the base gets no updates."""
    base, adapter = made()
    params = {"m": [Params(base, adapter)] * 2}
    tx = jlora.optimizer(optax.sgd(1.0))
    updates, _ = tx.update(jax.tree.map(np.ones_like, params), tx.init(params), params)
    for found in (x.base for x in updates["m"]):
        assert not any(np.any(u) for u in jax.tree.leaves(found) if u.dtype == jnp.float32)


VARIABLES = nnx.state(nnx.Dict(w=nnx.LoRAParam(X)), nnx.LoRAParam)
HELD: dict[str, Any] = {
    # A bare pair of base and adapter does not say which of the two is which.
    "pair": (lambda: made(), "\"[0]['bucket']\"", "an array at", "Put base and adapter into Par"),
    # In the state of a module no node says which arrays are A and B.
    "nnx": (lambda: VARIABLES, "\"['w'].value\"", "", "nnx.Optimizer(model, tx, wrt=nnx.LoRAPa"),
    "base": (lambda: {"base": made()[0], "adapter": made()[1]}, "'base'", "a dict of both"),
    "params": (lambda: {"params": made()[0], "adapter": made()[1]}, "'params'", "a dict of both"),
    # No leaf of it says whether a rule trains it in full, or no rule took it.
    "bound": (lambda: jlora.bind(*made()), "from `bind`", "Give the adapter in it, or Params."),
}  # fmt: skip


@pytest.mark.parametrize("case", HELD)
def test_optimizer_refuses_a_base_that_it_would_train(case: str) -> None:
    make, *facts = HELD[case]
    tree = make()
    for call in ("labels", "mask", "optimizer", "train-state"):
        with refused(TypeError, "tree", *facts):
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
    params = PLAIN[tree]()
    with refused(TypeError, "tree", "only arrays", "jlora.Params({}, adapter).", case=call):
        LABELING[call](params)


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
    for path, count in (("fused", "6 of 36 values"), ("layer/bias", "1 of 6 values")):
        with refused(ValueError, "merge", path, count, "use an earlier checkpoint."):
            jlora.merge(base, broken, check=True)
    # Finite factors whose sum with W is not finite in W's dtype.
    params = {"w": jnp.full((4, 6), 6e4, jnp.float16)}
    base, adapter = init(LoRA("w", rank=2), apply=dense, params=params)
    big = jax.tree.map(lambda a: jnp.full_like(a, 100.0), adapter)
    with refused(ValueError, "merge", "w", "24 of 24 values"):
        jlora.merge(base, big, check=True)


# ------------------------------------------------------------------------- other arguments

NO_KEY = "such as jax.random.key(0)"
WRONG: dict[type[Exception], dict[str, Any]] = {
    TypeError: {
        f"`key` ... got int. ... {NO_KEY}": lambda: init_by(0),
        f"`key` ... got dict. ... {NO_KEY}": lambda: jlora.transform(dense, LoRA("w")).init(
            W, KEY, X
        ),
        f"`key` ... got NoneType. ... {NO_KEY}": lambda: jlora.dropout(made()[1], None),
        f"`key` ... (4, 6). ... {NO_KEY}": lambda: jlora.dropout(made()[1], W["w"]),
        f"`key` ... key<fry> and shape (2,). ... {NO_KEY}": lambda: jlora.dropout(
            made()[1], jax.random.split(KEY, 2)
        ),
        "`adapter` ... the root ... float32[2,4] ... apply(base, adapter, x)?": lambda: (
            jlora.transform(dense).apply(W, X)
        ),
        "`base` ... got an adapter ... is one missing?": lambda: jlora.summary(made()[1]),
    },
    ValueError: {
        "`check` ... needs concrete values ... check the result outside": lambda: jax.jit(
            lambda a: jlora.merge(PARAMS, a, check=True)
        )(made()[1]),
        "`rank` ... the root ... is 9 ... jlora.Full('')": lambda: init(
            LoRA("", rank=9), apply=lambda w, x: x @ w, params=W["w"]
        ),
    },
}


# The argument or the path is named.
test_wrong_argument = all_refused(WRONG)


ROWS = [jlora.peft.Name("(.*)/kernel", r"\1", "io")]
PAIRS: dict[str, Any] = {
    "apply": (lambda x: jlora.transform(model).apply(x, X), "base"),
    "apply-base": (lambda x: jlora.transform(model).apply(x, {}, X), "base"),
    "apply-adapter": (lambda x: jlora.transform(model).apply(PARAMS, x, X), "adapter"),
    "merge-base": (lambda x: jlora.merge(x, made()[1]), "base"),
    "merge-adapter": (lambda x: jlora.merge(PARAMS, x), "adapter"),
    "bind": (lambda x: jlora.bind(x, {}), "base"),
    "summary": (lambda x: jlora.summary(x), "base"),
    "dropout": (lambda x: jlora.dropout(x, KEY), "adapter"),
    "quantize": (lambda x: jlora.quantize(x, jlora.NF4("fused")), "params"),
    "specs-base": (lambda x: jlora.sharding.specs(x, made()[1]), "base"),
    "specs-adapter": (lambda x: jlora.sharding.specs(PARAMS, x), "adapter"),
    "arithmetic": (lambda x: jlora.arithmetic.add([x, x]), "adapter"),
    "many": (lambda x: jlora.many.stack([x, x]), "adapter"),
    "checkpoint": (lambda x: jlora.checkpoint.save("nowhere", x, ()), "adapter"),
    "peft-base": (lambda x: jlora.peft.save("nowhere", x, made()[1], ROWS), "base"),
    "peft-adapter": (lambda x: jlora.peft.save("nowhere", PARAMS, x, ROWS), "adapter"),
}


@pytest.mark.parametrize("case", list(PAIRS))
def test_base_and_adapter_in_one(case: str) -> None:
    """A pair that was not unpacked, Params, and a bound tree, wherever one of both belongs."""
    call, argument = PAIRS[case]
    both = {"the pair": made(), "Params": jlora.Params(*made()), "a tree": jlora.bind(*made())}
    for got, x in both.items():
        with refused(TypeError, argument, f"got {got}"):
            call(x)


MANY = jlora.transform(dense, LoRA("w", rank=2))
KEYS: dict[str, Any] = {
    "init": (lambda key: init_by(key), "key"),
    "dropout": (lambda key: jlora.dropout(made()[1], key), "key"),
    "many": (lambda key: jlora.many.init(MANY, key, W, X), "keys"),
}


def init_by(key: Any) -> Any:
    """`init` of one site."""
    return jlora.transform(dense, LoRA("w", rank=2)).init(key, W, X)


@pytest.mark.parametrize("case", list(KEYS))
def test_keys_of_nnx(case: str) -> None:
    """`nnx.Rngs` has every attribute; a key that it draws is taken."""
    call, argument = KEYS[case]
    for rngs in (nnx.Rngs(0), nnx.Rngs(0).params):
        got = f"got {type(rngs).__name__} of flax.nnx"
        with refused(TypeError, argument, got, "Give rngs.params()."):
            call(rngs)
    assert init_by(nnx.Rngs(0).params())


def test_a_collection_of_linen_variables() -> None:
    """Flax's own error arrives, in `init` with a note; `apply` and `merge` compare trees."""
    module = nn.Dense(3)
    variables = module.init(KEY, X)
    for wrapped in (module.apply, jax.jit(module.apply), functools.partial(module.apply)):
        lora = jlora.transform(wrapped, LoRA("kernel", rank=2))
        for call in (
            lambda lora=lora: lora.init(KEY, variables["params"], X),
            lambda lora=lora: lora.sites(variables["params"], X),
        ):
            with pytest.raises(FlaxError, match="collection") as caught:
                call()
            check_note(caught.value)
        with pytest.raises(FlaxError, match="collection"):
            lora.apply(variables["params"], {}, X)
    adapter = lora.init(KEY, variables, X)[1]
    for f, *args in ((lora.apply, X), (jlora.merge,)):
        with refused(ValueError, "adapter", "params/kernel", "not in `base`"):
            f(variables["params"], adapter, *args)
        with refused(ValueError, "adapter", "kernel", "not in `base`"):
            f(variables, adapter["params"], *args)


def test_parameters_that_are_not_the_first_argument() -> None:
    """The model's own error, with a note; and rules that match no path of an activation."""
    lora = jlora.transform(lambda x, params: x @ params["w"], LoRA("w", rank=2))
    for call in (lambda: lora.init(KEY, W, X), lambda: lora.sites(W, X)):
        with pytest.raises(TypeError, match="string index") as caught:
            call()
        check_note(caught.value)
    with refused(ValueError, "params", "LoRA('w')", "Near misses: the root"):
        lora.init(KEY, X, W)


def check_note(error: Exception) -> None:
    """Compares jlora's note on somebody else's error."""
    [note] = (x for x in error.__notes__ if x.startswith("jlora"))
    check_text(note)


def test_a_train_state_in_the_place_of_parameters() -> None:
    """And a batch: the error of linen has a note."""
    module = nn.Dense(3)
    variables = module.init(KEY, X)
    tx = optax.sgd(0.1)
    state = TrainState.create(apply_fn=module.apply, params=variables["params"], tx=tx)
    lora = jlora.transform(module.apply, LoRA("kernel", rank=2))
    for wrong in (state, X):
        with pytest.raises(TypeError) as caught:
            lora.init(KEY, wrong, X)
        check_note(caught.value)


FULL, NAMES = Full("layer/kernel"), (peft.Name("(.*)", r"\1", "io"),)
PATHS: dict[str, Callable[[Any], Any]] = {
    "load": lambda path: peft.load(path, "adapter", peft.TABLES["llama"]),
    "save": lambda path: peft.save(path, *init(FULL), NAMES),
    "read": peft.read,
    "find_names": lambda path: peft.find_names(path, W, jlora.transform(dense).sites(W, X)),
    "export_merged": lambda path: peft.export_merged(path, "adapter", "out"),
    "load_base": lambda path: peft.load_base(path, PARAMS, peft.TABLES["llama"]),
    "save_base": lambda path: peft.save_base(path, W, NAMES),
    "check": lambda path: peft.check(path, "vllm"),
    "checkpoint.save": lambda path: checkpoint.save(path, init(FULL)[1], FULL),
    "checkpoint.restore": lambda path: checkpoint.restore(path, like={}),
    "checkpoint.base_shapes": checkpoint.base_shapes,
    "checkpoint.base_values": checkpoint.base_values,
    "checkpoint.export": lambda path: checkpoint.export(path, {"w": jnp.ones(2)}),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_tree_in_the_place_of_a_path(name: str) -> None:
    """Every function of files says which argument is no path."""
    with refused(TypeError, "", "a str or a pathlib.Path; got a dict. Is it in the place of"):
        PATHS[name](PARAMS)


def test_errors_of_the_model_pass() -> None:
    """What the user's own function raises arrives as it is, from each of the three."""

    class OwnError(Exception):
        pass

    def failing(p: Any, x: jax.Array, fail: bool) -> jax.Array:
        if fail:
            raise OwnError("mine")
        return x @ p["w"]

    lora, base, adapter = set_up(failing, LoRA("w", rank=2), W, X, False)
    keys = jlora.transform(lambda p, params: p["v"] @ params, LoRA("w", rank=2))
    with pytest.raises(KeyError) as caught:
        keys.init(KEY, W, X)
    assert not any("jlora" in note for note in getattr(caught.value, "__notes__", ()))
    for call in (
        lambda: lora.init(KEY, W, X, True),
        lambda: lora.sites(W, X, fail=True),
        lambda: lora.apply(base, adapter, X, True),
    ):
        with pytest.raises(OwnError, match=r"\Amine"):
            call()
