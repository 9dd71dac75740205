"""`LoRA()`: ranks that a site cannot have, and weights without a factored form."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jlora
from jlora import DoRA, LoRA, Slots
from jlora.initializers import miss

KEY, X = jax.random.key(0), jnp.ones((3, 16))


def head_of_two(params, x):
    return jnp.tanh(x @ params["layer"]) @ params["head"]


PARAMS = {"head": jnp.ones((16, 2)), "layer": jnp.ones((16, 16))}


def test_the_table_says_that_the_rank_is_clipped():
    table = str(jlora.transform(head_of_two, LoRA(rank=8, alpha=16)).sites(PARAMS, X))
    [line] = [line for line in table.split("\n") if line.startswith("head")]
    assert line.split()[-4:] == ["1", "(of", "8)", "18"]


def scanned(params, x):
    return lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]


def plain(params, x):
    return x @ params["w"]


FUSED = Slots(2, (1,))


@pytest.mark.parametrize(
    ("rule", "model", "shape", "rank"),
    [
        (LoRA(), plain, (16, 4), 3),
        (LoRA(rslora=True), plain, (4, 16), 3),
        (LoRA(), plain, (16, 16), 8),
        (LoRA(rank=3), plain, (16, 4), 3),
        (LoRA(), plain, (2, 1), 1),
        (LoRA(), plain, (1000, 1000), 8),
        (LoRA(rank=1000), plain, (1000, 1000), 500),
        (LoRA(), scanned, (3, 4, 4), 2),
        (LoRA(slots=FUSED), plain, (16, 8), 3),
        (LoRA(slots=FUSED, rank=2), plain, (16, 8), 2),
        (LoRA(init=miss), plain, (16, 4), 4),
        (DoRA(), plain, (16, 4), 3),
        (DoRA(), scanned, (3, 4, 4), 1),
        (DoRA(slots=FUSED), plain, (16, 32), 7),
    ],
)
def test_no_more_is_trained_than_a_weight_has(rule, model, shape, rank):
    """But at rank 1; of slots, than those that are adapted. A named rule has the rank it says."""
    params, x = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, jnp.ones((3, shape[-2]))
    lora = jlora.transform(model, rule)
    _, adapter = jax.eval_shape(lora.init, KEY, params, x)
    site = lora.sites(params, x)["w"]
    assert adapter["w"].a.shape[-1] == site.rule.rank == rank
    assert adapter["w"].scale == pytest.approx(rule.scale)
    assert site.asked_rank == (None if rank == rule.rank else rule.rank)
    share = 2 if rule.slots else 1
    assert rank == 1 or site.trainable <= site.size / share
    named = dataclasses.replace(rule, pattern="w", rank=min(rule.rank, min(shape[-2:]) // share))
    assert jlora.transform(model, named).sites(params, x)["w"].rule == named


def weight_norm(p, x):
    return x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0))


def masked(p, x):
    return x @ (p["w"] * jnp.tri(4))


def chosen(p, x):
    return x @ jnp.where(jnp.tri(4) > 0, p["w"], 0)


@jax.custom_vjp
def own_product(x, w):
    return x @ w


own_product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


def custom(p, x):
    return own_product(x, p["w"])


def scaled_carry(p, x):
    return lax.scan(lambda w, _: (w * 0.5, x @ w), p["w"], None, 2)[1]


MISSED = {
    "weight_norm": (weight_norm, "mul"),
    "masked": (masked, "mul"),
    "chosen": (chosen, "select_n"),
    "custom": (custom, "custom_vjp_call"),
    "scaled_carry": (scaled_carry, "scan"),
}


@pytest.mark.parametrize("name", MISSED)
def test_what_is_missed_is_listed_with_the_reason(name):
    """In the table, in a warning of `init`, and in the error where there is no site at all."""
    model, primitive = MISSED[name]
    both = lambda p, x: model(p, x) + x @ p["v"]  # noqa: E731
    params, x = {"v": jnp.ones((4, 4)), "w": jnp.ones((4, 4))}, jnp.ones((3, 4))
    lora = jlora.transform(both, LoRA(rank=2))
    used = rf"(an output of )?`{primitive}` at .*test_all_linear\.py:\d+ \({name}\)"
    sites = lora.sites(params, x)
    assert [s.path for s in sites.missed] == ["w"]
    table = str(sites).split("\n")
    assert table[-1].endswith("; 1 more weights have no factored form")
    assert table[-1].startswith("1 of 1 sites adapted; ")
    [line] = [line for line in table if line.startswith("w ")]
    assert re.search(f"  used in {used}(, where .*)?$", line)
    with pytest.warns(UserWarning, match=rf"^LoRA\(\) leaves 1 weights as they are.*w \({used}"):
        _, adapter = lora.init(KEY, params, x)
    assert set(adapter) == {"v"}
    alone = jlora.transform(model, LoRA(rank=2))
    with pytest.raises(ValueError, match=r"the model has none.*\n.*\n  w: used in .*`"):
        alone.init(KEY, params, x)


def test_what_is_an_activation_is_listed_without_a_warning():
    """A position that is added, a token that is joined, a bias of two axes."""

    def model(p, x):
        x = jnp.concatenate([p["token"], x + p["position"]])
        return jnp.einsum("ti,iho->tho", x, p["w"]) + p["bias"]

    shapes = {"token": (1, 4), "position": (3, 4), "w": (4, 2, 3), "bias": (2, 3)}
    params, x = {n: jnp.ones(s) for n, s in shapes.items()}, jnp.ones((3, 4))
    lora = jlora.transform(model, LoRA(rank=2))
    assert not lora.sites(params, x).missed
    lora.init(KEY, params, x)  # warnings are errors
    listed = {line.split()[0] for line in str(lora.sites(params, x)).split("\n")[2:-2]}
    assert listed == {"position", "w", "bias"}


def test_full_leaf_that_is_not_used():
    lora = jlora.transform(head_of_two, LoRA("layer"), jlora.Full("spare"))
    message = r"Full\('spare'\) matches 'spare' of shape \(3,\), which "
    with pytest.raises(ValueError, match=message):
        lora.init(KEY, PARAMS | {"spare": jnp.ones(3)}, X)
