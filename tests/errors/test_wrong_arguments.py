"""Wrong arguments are named, and the errors of other libraries arrive as they are."""

from typing import Any

import jax
import optax
import pytest
from flax import linen as nn
from flax.errors import FlaxError
from small import ADAPTED, KEY, PARAMS, W, X, dense, exactly, init, message_of

import jlora
from jlora import LoRA, Slots


def one_site() -> jlora.LowRank:
    """The node of an adapter of `dense`."""
    return init(LoRA("w", rank=2), apply=dense, params=W)[1]["w"]


LEAKS = {
    "slots-chosen-int": (lambda: Slots(3, 0), "`chosen` of Slots"),
    "slots-axis-string": (lambda: Slots(3, (0,), axis="out"), "`axis` of Slots"),
    "slots-axis-float": (lambda: Slots(3, (0,), axis=0.5), "`axis` of Slots"),
    "initializer-string": (lambda: LoRA("w", init="gaussian"), "`init` of LoRA('w')"),
    "dtype-unknown": (lambda: LoRA("w", dtype="float33"), "`dtype` of LoRA('w')"),
    "alpha-huge": (lambda: LoRA("w", alpha=10**400), "`alpha` of LoRA('w')"),
    "no-apply-function": (lambda: jlora.transform(LoRA("w"), LoRA("w")), "`apply_fn`"),
    "tx-not-called": (lambda: jlora.optimizer(optax.adamw), "`tx`"),
    "tx-learning-rate": (lambda: jlora.optimizer(1e-3), "`tx`"),
    "lora-plus-string": (lambda: jlora.optimizer(optax.sgd(1.0), lora_plus="16"), "`lora_plus`"),
    "key-int": (lambda: jlora.transform(dense, LoRA("w", rank=2)).init(0, W, X), "`key`"),
    "key-and-params-swapped": (
        lambda: jlora.transform(dense, LoRA("w", rank=2)).init(W, KEY, X),
        "`key`",
    ),
    "initializer-pair": (
        lambda: init(LoRA("w", rank=2, init=lambda *_: (X, X)), apply=dense, params=W),
        "`init` of LoRA",
    ),
    "initializer-lists": (
        lambda: init(LoRA("w", rank=2, init=lambda *_: (X, [], [])), apply=dense, params=W),
        "`init` of LoRA",
    ),
    "initializer-other-w": (
        lambda: init(
            LoRA("w", rank=2, init=lambda k, w, s, r: jlora.initializers.gaussian(k, w[:3], s, r)),
            apply=dense,
            params=W,
        ),
        "`init` of LoRA",
    ),
    "dropout-key-int": (lambda: jlora.dropout(init(*ADAPTED)[1], 0), "`key`"),
    "dropout-keys": (
        lambda: jlora.dropout(
            init(LoRA("w", rank=2, dropout=0.5), apply=dense, params=W)[1],
            jax.random.split(KEY, 2),
        ),
        "`key`",
    ),
    "factor-none": (
        lambda: jlora.merge(W, {"w": one_site()._replace(a=None)}),
        "w: ",
    ),
    "factor-string": (
        lambda: jlora.merge(W, {"w": one_site()._replace(b="b")}),
        "w: ",
    ),
    "merge-check-under-jit": (
        lambda: jax.jit(lambda a: jlora.merge(PARAMS, a, check=True))(init(*ADAPTED)[1]),
        "`check`",
    ),
    "adapter-forgotten": (lambda: jlora.transform(dense).apply(W, X), "the root"),
    "root-rank": (
        lambda: init(LoRA("", rank=9), apply=lambda w, x: x @ w, params=W["w"]),
        "the root",
    ),
    "bound-base": (
        lambda: jlora.merge(jlora.bind(*init(*ADAPTED)), init(*ADAPTED)[1]),
        "bind",
    ),
}


@pytest.mark.parametrize("case", list(LEAKS))
def test_clear_error(case: str) -> None:
    """The argument or the path is named."""
    provoke, named_in = LEAKS[case]
    assert named_in in message_of(provoke)


def test_module_instead_of_its_apply() -> None:
    """A module says what to give; parameters without their collection are Flax's own error."""
    module = nn.Dense(3)
    variables = module.init(KEY, X)
    lora = jlora.transform(module.apply, LoRA("kernel", rank=2))
    with pytest.raises(TypeError, match="Give its apply"):
        jlora.transform(module, LoRA("kernel", rank=2))
    with pytest.raises(FlaxError, match="collections"):
        lora.init(KEY, variables["params"], X)


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
    for call in (
        lambda: lora.init(KEY, W, X, True),
        lambda: lora.sites(W, X, fail=True),
        lambda: lora.apply(base, adapter, X, True),
    ):
        with pytest.raises(OwnError, match=exactly("mine")):
            call()
