"""Wrong arguments are named, and the errors of other libraries arrive as they are."""

import functools
from typing import Any

import jax
import pytest
from flax import linen as nn
from flax import nnx
from flax.errors import FlaxError
from small import ADAPTED, KEY, PARAMS, W, X, dense, each_refusal, exactly, init, model

import jlora
from jlora import LoRA

ARRAY = "an array of float32 and shape (4, 6)"
KEYS_OF_SEVERAL = "an array of key<fry> and shape (2,)"
KEY_IS = "`key` must be one PRNG key, such as jax.random.key(0); got "
CHECK = (
    "`check` of merge needs concrete values; under jit, grad or vmap there are none. Merge without "
    "it there, and check the result outside."
)
FORGOTTEN = (
    "`adapter` must be a nested dict of LowRank nodes and arrays, as `init` returns it, with paths "
    "of `base`; got the root: float32[2,4]. Was it forgotten, as in apply(base, x) for "
    "apply(base, adapter, x)? For the base model alone it is {}."
)
BOUND = (
    "`base` holds LowRank nodes, so it is an adapter, or a tree from `bind`: are `base` and "
    "`adapter` swapped?"
)
WRONG: dict[type[Exception], dict[str, Any]] = {
    TypeError: {
        f"{KEY_IS}int.": lambda: init_by(0),
        f"{KEY_IS}dict.": lambda: jlora.transform(dense, LoRA("w")).init(W, KEY, X),
        f"{KEY_IS}NoneType.": lambda: jlora.dropout(pair()[1], None),
        f"{KEY_IS}{ARRAY}.": lambda: jlora.dropout(pair()[1], W["w"]),
        f"{KEY_IS}{KEYS_OF_SEVERAL}.": (lambda: jlora.dropout(pair()[1], jax.random.split(KEY, 2))),
        FORGOTTEN: lambda: jlora.transform(dense).apply(W, X),
        BOUND: lambda: jlora.merge(jlora.bind(*pair()), pair()[1]),
    },
    ValueError: {
        CHECK: lambda: jax.jit(lambda a: jlora.merge(PARAMS, a, check=True))(pair()[1]),
        "`rank` of LoRA('') is 9, above min(inputs, outputs) = 4 of the root with shape (4, 6). "
        "Lower the rank, or put a rule of its own for this leaf first, such as jlora.Full('').": (
            lambda: init(LoRA("", rank=9), apply=lambda w, x: x @ w, params=W["w"])
        ),
    },
}


@each_refusal(WRONG)
def test_wrong_argument(provoke: Any, error: type[Exception], message: str) -> None:
    """The argument or the path is named."""
    with pytest.raises(error, match=exactly(message)):
        provoke()


@functools.cache
def pair() -> Any:
    """What `init` returns, as one value."""
    return init(*ADAPTED)


BASE = "`base` must be the frozen tree alone; got "
ADAPTER = "`adapter` must be a nested dict of LowRank nodes and arrays; got "
ROWS = [jlora.peft.Name("(.*)/kernel", r"\1", "io")]
PAIRS = {
    "apply": (lambda x: jlora.transform(model).apply(x, X), BASE),
    "apply-base": (lambda x: jlora.transform(model).apply(x, {}, X), BASE),
    "apply-adapter": (lambda x: jlora.transform(model).apply(PARAMS, x, X), ADAPTER),
    "merge-base": (lambda x: jlora.merge(x, pair()[1]), BASE),
    "merge-adapter": (lambda x: jlora.merge(PARAMS, x), ADAPTER),
    "bind": (lambda x: jlora.bind(x, {}), BASE),
    "dropout": (lambda x: jlora.dropout(x, KEY), ADAPTER),
    "specs-base": (lambda x: jlora.sharding.specs(x, pair()[1]), BASE),
    "specs-adapter": (lambda x: jlora.sharding.specs(PARAMS, x), ADAPTER),
    "arithmetic": (lambda x: jlora.arithmetic.add([x, x]), ADAPTER),
    "many": (lambda x: jlora.many.stack([x, x]), ADAPTER),
    "checkpoint": (lambda x: jlora.checkpoint.save("nowhere", x, ()), ADAPTER),
    "peft-base": (lambda x: jlora.peft.save("nowhere", x, pair()[1], ROWS), BASE),
    "peft-adapter": (lambda x: jlora.peft.save("nowhere", PARAMS, x, ROWS), ADAPTER),
}
UNPACK = "the pair that `init` returns. Unpack it: base, adapter = lora.init(...)."
APART = "Params. Give its `base` and `adapter` one by one."


@pytest.mark.parametrize("case", list(PAIRS))
def test_base_and_adapter_in_one(case: str) -> None:
    """A pair that was not unpacked, and Params, wherever one of both belongs."""
    provoke, start = PAIRS[case]
    for x, got in ((pair(), UNPACK), (jlora.Params(*pair()), APART)):
        with pytest.raises(TypeError, match=exactly(start + got)):
            provoke(x)


DRAWN = "`key` must be one PRNG key; got {} of flax.nnx. Give rngs.params()."
KEYS = {
    "init": (lambda key: init_by(key), DRAWN),
    "dropout": (lambda key: jlora.dropout(pair()[1], key), DRAWN),
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
                "jlora: Dense.apply takes the variables of model.init, a dict with the key "
                "'params'; got the keys 'kernel', 'bias'. Give variables, not variables['params']."
            )
    adapter = lora.init(KEY, variables, X)[1]
    message = (
        "`adapter` does not fit `base`: the paths of `{}` begin with 'params/', those of `{}` do "
        "not. Give both with it, as variables has it, or both without, as variables['params']."
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
            "jlora: `apply_fn` is called with the parameters first, as its `x`. If they are its "
            "`params`, give jlora.transform a function that takes them first, such as "
            "lambda params, x: apply_fn(x, params)."
        )
    message = (
        "LoRA('w') matches no leaf of `params`, which is one array of shape (2, 4). Are the "
        "arguments in another order? The parameters come first: init(key, params, *args), and "
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
