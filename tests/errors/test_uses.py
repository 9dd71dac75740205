"""Uses of a weight without a factored form: refused by line and primitive, or formed if asked."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from small import (
    REMEDY,
    SQUARE,
    X,
    assert_same,
    dense,
    exactly,
    init,
    line_of,
    message_of,
    randomize,
    scalar,
    use_sin,
)

import jlora
from jlora import LoRA


@jax.custom_vjp
def vjp_product(w: jax.Array, x: jax.Array) -> jax.Array:
    """x·W with a gradient of its own, twice what it should be."""
    return x @ w


vjp_product.defvjp(
    lambda w, x: (x @ w, (w, x)),
    lambda saved, g: (2 * saved[1].T @ g, 2 * g @ saved[0].T),
)


@jax.custom_jvp
def jvp_product(w: jax.Array, x: jax.Array) -> jax.Array:
    """x·W with a derivative of its own, twice what it should be."""
    return x @ w


@jvp_product.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (w, x), (dw, dx) = primals, tangents
    return x @ w, 2 * (x @ dw + dx @ w)


def use_sum(p: Any, x: jax.Array) -> Any:
    """A reduction: weight normalization."""
    return x @ p["w"] / jnp.sum(p["w"])  # here


def use_vjp(p: Any, x: jax.Array) -> Any:
    """A function with its own backward pass."""
    return vjp_product(p["w"], x)  # here


def use_jvp(p: Any, x: jax.Array) -> Any:
    """A function with its own derivative."""
    return jvp_product(p["w"], x)  # here


def use_carry(p: Any, x: jax.Array) -> Any:
    """A loop whose carry is the weight and changes."""

    def body(carry: Any, _: None) -> Any:
        w, x = carry
        return (w * 0.5, x @ w), None

    return lax.scan(body, (p["w"], x), length=2)[0]  # here


def use_cond(p: Any, x: jax.Array) -> Any:
    """One branch of two."""
    return lax.cond(
        x[0, 0] > 0,
        lambda w: x @ jnp.sin(w),  # here
        lambda w: x @ w,
        p["w"],
    )


def use_chosen(p: Any, x: jax.Array) -> Any:
    """Branches that return a weight."""
    return x @ lax.cond(x[0, 0] > 0, lambda w: w.T, lambda w: w, p["w"])  # here


def use_predicate(p: Any, x: jax.Array) -> Any:
    """A predicate that looks at the weight."""
    return lax.cond(p["w"][0, 0] > 0, lambda: x @ p["w"], lambda: -x)  # here


def use_stacked(p: Any, x: jax.Array) -> Any:
    """A scan that stacks multiples of the weight."""
    return lax.scan(lambda c, _: (c @ p["w"], p["w"] * 2), x, length=2)  # here


def use_nested(p: Any, x: jax.Array) -> Any:
    """All of them at once."""

    def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.jit(lambda w: x @ jnp.sin(w))(p["w"]), None  # here

    return lax.scan(jax.checkpoint(body), x, length=2)[0]


def use_divisor(p: Any, x: jax.Array) -> Any:
    """The weight divides."""
    return x @ (1 / (3 + p["w"]))  # here


def use_padding(p: Any, x: jax.Array) -> Any:
    """Padded with an entry of itself."""
    corner = lax.squeeze(lax.slice(p["w"], (0, 0), (1, 1)), (0, 1))
    return x @ lax.pad(p["w"], corner, ((0, 0, 0), (0, 2, 0)))  # here


def use_mask(p: Any, x: jax.Array) -> Any:
    """A product with a mask."""
    return x @ (p["w"] * jnp.eye(4))  # here


def use_integer(p: Any, x: jax.Array) -> Any:
    """Fake quantization: nothing of the weight's gradient is left, that of x is."""
    return (x + p["w"][:2]) @ p["w"].astype(jnp.int8).astype(jnp.float32)


def use_output(p: Any, x: jax.Array) -> Any:
    """The weight as one of the outputs."""
    return x @ p["w"], p["w"]


class Outside(NamedTuple):
    """A use that no rule covers.

    Attributes:
        apply: the model, its line marked `# here`.
        what: the primitive and the line, as the error names them first; `{here}` is the place.
        only: whether the weight has no linear use beside it.
    """

    apply: Callable[..., Any]
    what: str
    only: bool = True


OUTSIDE = [
    Outside(use_sin, "`sin` at {here} ({name})"),
    Outside(use_sum, "`reduce_sum` at {here} ({name})", only=False),
    Outside(use_vjp, "`custom_vjp_call` at {here} ({name})"),
    Outside(use_jvp, "`custom_jvp_call` at {here} ({name})"),
    Outside(use_carry, "an output of `scan` at {here} ({name})"),
    Outside(use_cond, "`sin` at {here} ({name}.<locals>.<lambda>)", only=False),
    Outside(use_chosen, "an output of `cond` at {here} ({name})"),
    Outside(use_predicate, "`gt` at {here} ({name})", only=False),
    Outside(use_stacked, "an output of `scan` at {here} ({name})", only=False),
    Outside(use_nested, "`sin` at {here} ({name}.<locals>.body.<locals>.<lambda>)"),
    Outside(use_divisor, "`add` at {here} ({name})"),
    Outside(use_padding, "`pad` at {here} ({name}), where the weight is a padding value"),
    Outside(use_mask, "`mul` at {here} ({name}), where it is scaled by more than a scalar"),
]
OUTPUT = Outside(use_output, "the function's outputs", only=False)


def named(outsides: list[Outside]) -> list[Any]:
    """The entries as parameters with their names."""
    return [pytest.param(o, id=o.apply.__name__.removeprefix("use_")) for o in outsides]


def first_use(outside: Outside) -> str:
    """What the error says of the first use."""
    if "{here}" not in outside.what:
        return outside.what
    here = line_of(outside.apply, "# here")
    return outside.what.format(here=here, name=outside.apply.__name__)


@pytest.mark.parametrize("outside", named([*OUTSIDE, OUTPUT]))
def test_outside_is_refused_by_init(outside: Outside) -> None:
    """The leaf, the primitive, the line in this file, and what to do."""
    if outside.only:
        error: Any = ValueError
        start = "LoRA('w') matches 'w' of shape (4, 4), which is used by nothing linear: "
        start += f"it is used only by {first_use(outside)}"
        end = REMEDY
    else:
        error = NotImplementedError
        start = "LoRA('w') matches 'w', which the model also uses where W + s·A·B has no "
        start += f"factored form: {first_use(outside)}"
        end = "Leave it out of the rules, or let W + ΔW be formed there with "
        end += "LoRA(..., materialize=True): exact, but at full memory and time."
    with pytest.raises(error) as caught:
        init(LoRA("w", rank=2), apply=outside.apply, params=SQUARE)
    message = str(caught.value)
    assert message.startswith(start)
    assert message.endswith(f". {end}")
    others = message[len(start) : -len(f". {end}")]
    assert re.fullmatch(r"(; .* at .*)*", others)


# One entry of W is as cheap as an activation: `apply` forms it, although `init` refuses.
SEEN = [o for o in [*OUTSIDE, OUTPUT] if o.apply is not use_predicate]


@pytest.mark.parametrize("outside", named(SEEN))
def test_outside_is_refused_by_apply(outside: Outside) -> None:
    """The same for a call that `init` did not see, eagerly and under `jit`."""
    base, adapter = init(LoRA("w", rank=2), apply=dense, params=SQUARE)
    message = (
        f"the weight 'w' reaches {first_use(outside)}, for which there is no factored form of "
        "W + s·A·B. Leave the weight out of the rules, or let W + ΔW be formed there with "
        "LoRA(..., materialize=True): exact, but at full memory and time."
    )
    lora = jlora.transform(outside.apply, LoRA("w", rank=2))
    for apply in (lora.apply, jax.jit(lora.apply)):
        with pytest.raises(NotImplementedError, match=exactly(message)):
            apply(base, adapter, X)


def formed() -> list[Any]:
    """The uses as parameters; some of each kind every day."""
    rows = named([*OUTSIDE, OUTPUT, Outside(use_integer, "")])
    daily = ("vjp", "carry", "cond", "padding", "integer", "output")
    return [
        x if x.id in daily else pytest.param(*x.values, id=x.id, marks=pytest.mark.slow)
        for x in rows
    ]


@pytest.mark.parametrize("outside", formed())
def test_outside_is_exact_when_formed(outside: Outside) -> None:
    """With `materialize=True`: values and gradients are those of the merged weights."""
    rule = LoRA("w", rank=2, materialize=True)
    base, adapter = init(rule, apply=outside.apply, params=SQUARE)
    adapter = randomize(adapter)

    def adapted(adapter: Any, x: jax.Array) -> Any:
        return jlora.transform(outside.apply, rule).apply(base, adapter, x)

    def merged(adapter: Any, x: jax.Array) -> Any:
        return outside.apply(jlora.merge(base, adapter), x)

    def loss(f: Any, adapter: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        outputs = f(adapter, x)
        return scalar(outputs), outputs

    slope = jax.jit(jax.grad(loss, (1, 2), has_aux=True), static_argnums=0)
    expected = slope(merged, adapter, X)
    assert any(np.any(g) for g in jax.tree.leaves(expected[0]))
    assert_same(slope(adapted, adapter, X), expected)


def test_every_use_is_named() -> None:
    """Two uses without a factored form, two places; the same twice, one place."""

    def twice(p: Any, x: jax.Array) -> jax.Array:
        y = x @ jnp.sin(p["w"])  # first
        y = y @ jnp.tanh(p["w"])  # second
        return y @ p["w"]

    with pytest.raises(NotImplementedError) as caught:
        init(LoRA("w", rank=2), apply=twice, params=SQUARE)
    first, second = line_of(twice, "# first"), line_of(twice, "# second")
    where = "test_every_use_is_named.<locals>.twice"
    assert f"`sin` at {first} ({where}); `tanh` at {second} ({where})." in str(caught.value)
    assert str(caught.value).count("`sin`") == 1


def test_dropout_where_formed() -> None:
    """Dropout has no input to act on where W + ΔW is formed, and `init` says so."""
    message = (
        f"dropout cannot act where W + ΔW is formed (`sin` at {line_of(use_sin, '# here')} "
        "(use_sin)): there is no input to drop. Give this site a rule with dropout=0."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        init(LoRA("w", rank=2, dropout=0.5, materialize=True), apply=use_sin, params=SQUARE)


def use_raveled(p: Any, x: jax.Array) -> Any:
    """Element for element, on a vector."""
    return x @ jnp.sin(p["w"].ravel()).reshape(4, 4)


def use_mixed(p: Any, x: jax.Array) -> Any:
    """Element for element, with axes mixed."""
    return x @ jnp.sin(p["w"].reshape(8, 2)).reshape(4, 4)


def use_batched(p: Any, x: jax.Array) -> Any:
    """A product that contracts one axis and batches the other."""
    return jnp.einsum("bio,io->bo", jnp.stack([x, x, x, x], 2), p["w"])


def use_one_output(p: Any, x: jax.Array) -> Any:
    """All axes contracted: a product with one output."""
    return jnp.tile(x, (1, 4)) @ p["w"].reshape(16, 1)


def use_rows(p: Any, x: jax.Array) -> Any:
    """One row at a time, as a scale."""
    return lax.scan(lambda c, row: (c * row, None), x, p["w"])[0]


def use_row(p: Any, x: jax.Array) -> Any:
    """One row, added."""
    return x + p["w"][0]


@pytest.mark.parametrize(
    "apply",
    [use_raveled, use_mixed, use_batched, use_one_output, use_rows, use_row],
    ids=lambda f: f.__name__.removeprefix("use_"),
)
def test_materialize_reaches_every_use(apply: Callable[..., Any]) -> None:
    """With `materialize=True` any use is exact."""
    rule = LoRA("w", rank=2, materialize=True)
    base, adapter = init(rule, apply=apply, params=SQUARE)
    adapter = randomize(adapter)
    actual = jlora.transform(apply, rule).apply(base, adapter, X)
    assert_same(actual, apply(jlora.merge(base, adapter), X))


def test_used_leaf_is_not_called_unused() -> None:
    """The message says what stands in the way."""
    text = message_of(lambda: init(LoRA("w", rank=2), apply=use_one_output, params=SQUARE))
    assert "not used by the traced call" not in text


def use_where(p: Any, x: jax.Array) -> Any:
    """A function of `jax.numpy` that is jitted."""
    return x @ jnp.where(x[0, 0] > 0, p["w"], 0.0)  # here


def test_line_of_a_library_function() -> None:
    """The user's line that calls `jnp.where`."""
    text = message_of(lambda: init(LoRA("w", rank=2), apply=use_where, params=SQUARE))
    assert line_of(use_where, "# here") in text
