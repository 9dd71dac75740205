"""Uses of a weight: those without a factored form are refused by line and primitive, or formed.

Python code in the model that asks for the value of a leaf, too.
"""

import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from cases.control import doubling
from jax import lax
from messages import refused
from small import KEY, REMEDY, SQUARE, W, X, dense, init, line_of, some, use_sin

import jlora
from jlora import LoRA

RULE, FORMED = LoRA("w", rank=2), LoRA("w", rank=2, materialize=True)


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
    return doubling(x, p["w"])  # here


def use_jvp(p: Any, x: jax.Array) -> Any:
    """A function with its own derivative."""
    return jvp_product(p["w"], x)  # here


def use_carry(p: Any, x: jax.Array) -> Any:
    """A loop whose carry is the weight and changes."""
    body = lambda carry, _: ((carry[0] * 0.5, carry[1] @ carry[0]), None)  # noqa: E731
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


def use_convolution(p: Any, x: jax.Array) -> Any:
    """Convolved with itself: kernel and input are weights."""
    w = p["w"][None, None]
    return x @ lax.conv(w, w, (1, 1), "SAME")[0, 0]  # here


def use_mask(p: Any, x: jax.Array) -> Any:
    """A product with a mask."""
    return x @ (p["w"] * jnp.eye(4))  # here


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

    @property
    def first_use(self) -> str:
        """What the error says of the first use."""
        if "{here}" not in self.what:
            return self.what
        return self.what.format(here=line_of(self.apply, "# here"), name=self.apply.__name__)


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
    Outside(use_padding, "`pad` at {here} ({name}): the weight is a padding value"),
    Outside(
        use_convolution, "`conv_general_dilated` at {here} ({name}): the weight is not the kernel"
    ),
    Outside(use_mask, "`mul` at {here} ({name}): it is scaled by more than a scalar"),
    Outside(use_output, "the function's outputs", only=False),
]


def name_of(x: Any) -> str:
    """The pytest id of a use."""
    return (x.apply if isinstance(x, Outside) else x).__name__.removeprefix("use_")


@pytest.mark.parametrize("outside", OUTSIDE, ids=name_of)
def test_outside_is_refused(outside: Outside) -> None:
    """The leaf, the primitive, the line in this file, and what to do; by `apply` and under `jit`.

    One entry of W is as cheap as an activation: `apply` forms it, although `init` refuses.
    """
    with refused(NotImplementedError, "", "LoRA('w') matches 'w'", outside.first_use, REMEDY):
        init(RULE, apply=outside.apply, params=SQUARE)
    if outside.apply is use_predicate:
        return
    base, adapter = init(RULE, apply=dense, params=SQUARE)  # for a call that `init` did not see
    lora = jlora.transform(outside.apply, RULE)
    for apply in (lora.apply, jax.jit(lora.apply)):
        with refused(NotImplementedError, "", "weight 'w'", outside.first_use, "materialize=True"):
            apply(base, adapter, X)


# What is added is an activation, and no weight that is missed.
MISSED = [o for o in OUTSIDE if o.only and o.apply is not use_divisor]


@pytest.mark.parametrize("outside", MISSED, ids=name_of)
def test_what_all_linear_misses_is_listed_with_the_reason(outside: Outside) -> None:
    """In the table, in a warning of `init`, and in the error where there is no site at all."""
    both = lambda p, x: (outside.apply(p, x), x @ p["v"])  # noqa: E731
    params, lora = SQUARE | {"v": X.T @ X}, jlora.transform(both, LoRA(rank=2))
    what = re.escape(outside.what.split("{here}")[0])
    used = rf"{what}.*/(test_uses|small)\.py:\d+ \({outside.apply.__name__}"
    sites = lora.sites(params, X)
    assert [s.path for s in sites.missed] == ["w"]
    *_, line, _, total, note = str(sites).split("\n")
    assert line.split()[0] == "w" and line.endswith(" 1")  # the number of the note
    assert re.fullmatch("1 of 1 sites adapted; .*; 1 more weights have no factored form", total)
    assert re.match(f"note 1: used in {used}", note)
    with pytest.warns(UserWarning, match=rf"^LoRA\(\) does not adapt 1 weights.*w \({used}"):
        _, adapter = lora.init(KEY, params, X)
    assert set(adapter) == {"v"}
    with pytest.raises(ValueError, match=r"the model has none.*\n.*\n  w: used in .*`"):
        init(LoRA(rank=2), apply=outside.apply, params=SQUARE)


def use_integer(p: Any, x: jax.Array) -> Any:
    """Fake quantization: nothing of the weight's gradient is left, that of x is."""
    return (x + p["w"][:2]) @ p["w"].astype(jnp.int8).astype(jnp.float32)


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
    """One row at a time, as a scale; and one row, added."""
    return lax.scan(lambda c, row: (c * row, None), x + p["w"][0], p["w"])[0]


ODD = [use_integer, use_raveled, use_mixed, use_batched, use_one_output, use_rows]
DAILY = (use_vjp, use_carry, use_cond, use_padding, use_output, use_integer, use_batched, use_rows)


@pytest.mark.parametrize("apply", some([*(o.apply for o in OUTSIDE), *ODD], *DAILY), ids=name_of)
def test_outside_is_exact_when_formed(apply: Callable[..., Any]) -> None:
    """With `materialize=True`: values and gradients are those of the merged weights."""
    base, adapter = init(FORMED, apply=apply, params=SQUARE)
    lora, adapter = jlora.transform(apply, FORMED), laws.randomize(adapter)

    def adapted(given: Any) -> Any:
        return lora.apply(base, *given)

    def merged(given: Any) -> Any:
        return apply(jlora.merge(base, given[0]), given[1])

    both = jax.jit(lambda given: [laws.value_and_slope(f)(given) for f in (adapted, merged)])
    actual, expected = both((adapter, X))
    assert any(np.any(g) for g in jax.tree.leaves(expected[1]))
    laws.assert_close(actual, expected, 1e-5)


def test_every_use_is_named() -> None:
    """Two uses without a factored form, two places; the same twice, one place."""

    def twice(p: Any, x: jax.Array) -> jax.Array:
        y = x @ jnp.sin(p["w"])  # first
        y = y @ jnp.tanh(p["w"])  # second
        return y @ p["w"]

    first, second = line_of(twice, "# first"), line_of(twice, "# second")
    where = "test_every_use_is_named.<locals>.twice"
    said = f"`sin` at {first} ({where}); `tanh` at {second} ({where})."
    with refused(NotImplementedError, "sin", said) as caught:
        init(RULE, apply=twice, params=SQUARE)
    assert str(caught.value).count("`sin`") == 1
    with refused(NotImplementedError, "", "products that leave it no inputs or no outputs"):
        init(RULE, apply=use_one_output, params=SQUARE)


def test_dropout_where_formed() -> None:
    """Dropout has no input to act on where W + ΔW is formed, and `init` says so."""
    place = f"{line_of(use_sin, '# here')} (use_sin)"
    with refused(ValueError, "sin", place, "no input to drop", "dropout=0."):
        init(LoRA("w", rank=2, dropout=0.5, materialize=True), apply=use_sin, params=SQUARE)


def use_where(p: Any, x: jax.Array) -> Any:
    """A function of `jax.numpy` that is jitted."""
    return x @ jnp.where(x[0, 0] > 0, p["w"], 0.0)  # here


def test_line_of_a_library_function() -> None:
    """The user's line that calls `jnp.where`."""
    with refused(NotImplementedError, "", line_of(use_where, "# here")):
        init(RULE, apply=use_where, params=SQUARE)


# --------------------------------------------------------------------------- values in Python

PYTHON_VALUES = {
    "int": ({"heads": 2}, lambda p, x: (x @ p["w"]).reshape(p["heads"], -1)),
    "vector": ({"gate": np.ones(1)}, lambda p, x: x @ p["w"] if p["gate"][0] > 0 else x),
    "float": ({"scale": jnp.float32(2)}, lambda p, x: x @ p["w"] * float(p["scale"])),
    "numpy": ({"mask": np.eye(4, 6)}, lambda p, x: x @ (p["w"] * np.asarray(p["mask"]))),
}


@pytest.mark.parametrize("case", PYTHON_VALUES)
def test_python_reads_a_leaf_that_is_not_adapted(case: str) -> None:
    """Leaves that no rule takes keep their values, as `apply` keeps them."""
    extra, apply = PYTHON_VALUES[case]
    base, adapter = init(FORMED if case == "numpy" else RULE, apply=apply, params=W | extra)
    actual = jlora.transform(apply).apply(base, adapter, X)
    laws.assert_close(actual, apply(W | extra, X), 1e-5)


BRANCHES = {
    "weight": lambda p, x: x @ p["w"] if p["w"].sum() > 0 else x,
    "activation": lambda p, x: x @ p["w"] if (x @ p["w"]).sum() > 0 else x,
    "numpy": lambda p, x: x @ np.asarray(p["w"]),
    "float": lambda p, x: x @ p["w"] * float(p["w"][0, 0]),
}


def test_python_reads_a_traced_flag() -> None:
    """The remedy is the one for flags, and it helps."""
    fn = lambda p, x, train=False: dense(p, x) * (2 if train else 1)  # noqa: E731
    base, adapter = init(RULE, apply=fn, params=SQUARE)
    apply = jlora.transform(fn).apply
    with refused(TypeError, "", "jax.jit(..., static_argnames=...)"):
        jax.jit(apply)(base, adapter, X, train=True)
    doubled = jax.jit(apply, static_argnames="train")(base, adapter, X, train=True)
    laws.assert_close(doubled, 2 * apply(base, adapter, X))


@pytest.mark.parametrize("case", BRANCHES)
def test_python_reads_an_adapted_weight(case: str) -> None:
    """Python code that asks for the value of an adapted weight is refused, by both."""
    apply = BRANCHES[case]
    with refused(TypeError, "", "reads the value of an array", "'w'") as caught:
        init(RULE, apply=apply, params=SQUARE)
    assert os.path.dirname(jlora.__file__) not in str(caught.value)  # no line of jlora
    base, adapter = init(RULE, apply=dense, params=SQUARE)
    with refused(TypeError, "", "reads the value of an array"):
        jlora.transform(apply).apply(base, adapter, X)
