"""`LoRA()`: ranks that a site cannot have, and weights without a factored form."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from small import set_up

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


def test_what_is_an_activation_is_listed_without_a_warning():
    """Positions that are added, once tiled, a token that is joined, a bias of two axes."""

    def model(p, x):
        x = jnp.concatenate([p["token"], x + p["position"] + jnp.tile(p["period"], (1, 2))])
        return jnp.einsum("ti,iho->tho", x, p["w"]) + p["bias"]

    shapes = {"token": (1, 4), "position": (3, 4), "w": (4, 2, 3), "bias": (2, 3)}
    shapes["period"] = (3, 2)
    params, x = {n: jnp.ones(s) for n, s in shapes.items()}, jnp.ones((3, 4))
    lora = jlora.transform(model, LoRA(rank=2))
    sites = lora.sites(params, x)
    assert not sites.missed
    assert (sites["bias"].kind, sites["bias"].layout) == (None, ((), (), (), None))
    lora.init(KEY, params, x)  # warnings are errors
    rows = str(sites).partition(" sites adapted")[0].split("\n")[2:-2]
    assert {line.split()[0] for line in rows} == {"position", "period", "w", "bias"}


@pytest.mark.parametrize("rule", [LoRA(), DoRA()])
def test_an_empty_matrix_is_no_site(rule):
    """As of a block that a configuration leaves without features."""
    params = {"w": jnp.ones((16, 0)), "v": jnp.ones((0, 3)), "u": jnp.ones((3, 4))}
    lora, base, adapter = set_up(lambda p, x: x @ p["w"] @ p["v"] @ p["u"], rule, params, X)
    assert adapter.keys() == {"u"}
    assert not lora.apply(base, adapter, X).any()


def mapped(params, x):
    mesh, specs = jax.make_mesh((1,), ("x",), (AxisType.Auto,)), (P(), P("x"))
    return jax.shard_map(plain, mesh=mesh, in_specs=specs, out_specs=P("x"))(params, x)


def looped(params, x):
    return lax.scan(lambda x, w: (plain(w, x), None), x, params)[0]


def dead(params, x):
    jnp.tanh(params["spare"]).sum()
    return plain(params, x)


def branched(params, x):
    other = lambda p, x: plain(p, x) + lax.stop_gradient(2 * p["spare"]).sum()  # noqa: E731
    return lax.cond(x.sum() > 0, plain, other, params, x)


def repeated(params, x):
    body = lambda p, spare, x: (p, 2 * spare, plain(p, x))  # noqa: E731
    spare = params["spare"]
    return lax.while_loop(lambda _: False, lambda c: body(*c), (params, spare, x))[2]


def carried(params, x):
    """The spare leaf reaches a carry that reaches no output."""

    def body(carry, _):
        x, spare, sums = carry
        return (plain(params, x), 2 * spare, sums + spare), None

    return lax.scan(body, (x, params["spare"], 0 * params["spare"]), length=2)[0][0]


UNUSED = {
    "plain": plain,
    "jit": jax.jit(plain),
    "checkpoint": jax.jit(jax.checkpoint(plain)),
    "shard_map": mapped,
    "scan": looped,
    "dead code": jax.jit(dead),
    "cond": branched,
    "while": repeated,
    "carry": carried,
}


@pytest.mark.parametrize("model", UNUSED.values(), ids=UNUSED)
def test_full_leaf_that_is_not_used(model):
    params = {"w": jnp.ones((16, 16)), "spare": jnp.ones(3)}
    if model is looped:
        params = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    lora = jlora.transform(model, LoRA("w"), jlora.Full("spare"))
    with pytest.raises(ValueError, match=r"Full\('spare'\) for 'spare' of shape .* not use"):
        lora.init(KEY, params, X)


def summed(params, x):
    """The spare leaf reaches the output in the second iteration."""

    def body(carry, _):
        x, sums, spare = carry
        return (plain(params, x) + sums.sum(), spare, spare), None

    return lax.scan(body, (x, 0 * params["spare"], params["spare"]), length=3)[0][0]


def decided(params, x):
    """The spare leaf decides when a loop ends."""
    less = lambda c: c[0].sum() < c[1].sum()  # noqa: E731
    step = lambda c: (c[0] + 1, c[1])  # noqa: E731
    return plain(params, lax.while_loop(less, step, (x, params["spare"]))[0])


def printed(params, x):
    """The spare leaf is printed."""
    jax.debug.callback(lambda x: None, params["spare"])
    return plain(params, x)


@pytest.mark.parametrize("model", [summed, decided, printed])
def test_full_leaf_that_is_used_after_all(model):
    params = {"w": jnp.ones((16, 16)), "spare": jnp.ones(3)}
    lora = jlora.transform(model, LoRA("w"), jlora.Full("spare"))
    assert lora.sites(params, X)["spare"].rule == jlora.Full("spare")
