"""Experts that share a factor, rows of them with an adapter each, files, what is refused."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import all_refused, refused
from peft_files import Folder, come_back
from small import array, assert_close, every, randomize, some

import jlora
from jlora import DoRA, Full, LoRA, checkpoint, many, peft

MIXTURE = {"up": (3, 6, 5), "down": (3, 5, 6)}
NAMES = [
    peft.Name("up", "mlp.experts", "eio", "up_proj"),
    peft.Name("down", "mlp.experts", "eio", "down_proj"),
]


def mixture(p: Any, x: jax.Array) -> jax.Array:
    """(3 experts, rows, 6) to the same."""
    h = jnp.tanh(jnp.einsum("ebi,eio->ebo", x, p["up"]))
    return jnp.einsum("ebi,eio->ebo", h, p["down"])


def make(*rules: LoRA) -> tuple[Any, Any, jlora.types.Transformed, jax.Array]:
    params, x = {name: array(*shape) for name, shape in MIXTURE.items()}, array(3, 4, 6)
    lora = jlora.transform(mixture, *rules)
    return *jax.jit(lora.init)(jax.random.key(1), params, x), lora, x


def test_ragged_products_cannot_be_mapped() -> None:
    """Over adapters: JAX has no rule for them, and the error names the weight."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, p["w"], jnp.array([1, 2]))

    params, x = {"w": array(2, 6, 4)}, array(3, 6)
    base, adapter = (lora := jlora.transform(apply, LoRA("w", rank=2))).init(
        jax.random.key(0), params, x
    )
    table = many.stack([adapter, adapter])
    facts = "'w'", "which JAX cannot map", "Use jlora.many.route or jax.lax.map"
    with refused(NotImplementedError, "ragged_dot_general", *facts):
        jax.vmap(lora.apply, (None, 0, None))(base, table, x)
    y = jax.lax.map(lambda a: lora.apply(base, a, x), table)
    np.testing.assert_allclose(y[1], lora.apply(base, adapter, x), rtol=1e-6)


DEPTH, LENGTH, CHOICES = 2, 7, 4  # tokens that choose the last of four are in no group


def routers(p: Any, x: jax.Array) -> jax.Array:
    """Layers in a scan, each with a dense weight, a router and experts in groups: (rows, 7, 8)."""

    @jax.checkpoint
    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        h = jnp.tanh(x.reshape(-1, 8) @ p["q"])
        choice = jnp.argmax(h[:, :CHOICES], axis=1)
        order = jnp.argsort(choice)
        sizes = jnp.bincount(choice, length=CHOICES)[:3].astype(jnp.int32)
        up = jnp.tanh(jax.lax.ragged_dot(h[order], p["up"], sizes))
        y = jnp.zeros_like(h).at[order].set(jax.lax.ragged_dot(up, p["down"], sizes))
        return x + y.reshape(x.shape), None

    return jax.lax.scan(layer, x, p)[0]


ROUTERS = {"q": (DEPTH, 8, 8), "up": (DEPTH, 3, 8, 12), "down": (DEPTH, 3, 12, 8)}
OF_TABLES: dict[str, tuple[tuple[Any, ...], Any, Any]] = {  # rules, scheme, dtype
    "all": ((LoRA(rank=2),), None, "float32"),
    "dense alone": ((LoRA("q", rank=2),), None, "float32"),
    "sharing inputs": ((LoRA("up|q", rank=2, share="inputs"),), None, "float32"),
    "in full": ((LoRA("q", rank=2), Full("up")), None, "float32"),
    "bfloat16": ((LoRA(rank=2),), None, "bfloat16"),
    "NF4": ((LoRA(rank=2),), jlora.NF4("q|up|down", double=False), "float32"),
    "NF4, dense alone": ((LoRA("q", rank=2),), jlora.NF4("q|up|down", double=False), "float32"),
    "Int8, sharing outputs": (
        (LoRA("down|q", rank=2, share="outputs"),),
        jlora.Int8("q|up|down"),
        "float32",
    ),
}
FORMS_OF = [None, "side by side", "gathered"]


@pytest.mark.parametrize(
    ("name", "form"),
    every(OF_TABLES, FORMS_OF, daily=[("all", FORMS_OF[1]), ("NF4, dense alone", FORMS_OF[2])]),
)
def test_each_row_of_routed_experts_is_its_adapters(name: str, form: Any) -> None:
    """Of traced and of known ids; ranks differ, -1 is the base."""
    rules, scheme, dtype = OF_TABLES[name]
    params = {path: jnp.asarray(array(*s) / 2, dtype) for path, s in ROUTERS.items()}
    x = jnp.asarray(array(6, LENGTH, 8), dtype)
    adapters = []
    for rank in (2, 1):
        of_rank = (r if isinstance(r, Full) else r.of_rank(rank) for r in rules)
        lora = jlora.transform(routers, *of_rank)
        base, adapter = jax.jit(lora.init)(jax.random.key(1), params, x[:1])
        adapters.append(randomize(adapter))
    base = base if scheme is None else jlora.quantize(base, scheme, sites=lora.sites(params, x[:1]))
    ids = np.array([0, 0, 1, 1, -1, -1])
    pairs = x.reshape(3, 2, *x.shape[1:])
    expected, of_base = jax.jit(
        lambda adapters, base: (
            jnp.concatenate([lora.apply(base, *own) for own in zip(adapters, pairs, strict=True)]),
            lora.apply(base, {}, pairs[0]),
        )
    )([*adapters, {}], base)
    expected = expected.astype(np.float32)
    assert np.abs(expected[:2] - of_base).max() > 0.05
    table = many.stack(adapters, base=base)
    routed = many.route(lora.apply, form=form)
    for y in (
        jax.jit(routed)(base, table, jnp.asarray(ids), x),
        jax.jit(lambda *args: routed(*args[:2], ids, args[2]))(base, table, x),
    ):
        assert_close(y.astype(np.float32), expected, 1e-5 if dtype == "float32" else 0.02)


@pytest.mark.slow
def test_no_adapter_of_experts_reaches_other_rows() -> None:
    """Values and gradients of rows whose slots are finite are finite where they are gathered."""
    params = {path: array(*shape) / 2 for path, shape in ROUTERS.items()}
    lora, x = jlora.transform(routers, LoRA(rank=2)), array(3, LENGTH, 8)
    base, adapter = jax.jit(lora.init)(jax.random.key(1), params, x[:1])
    good = randomize(adapter)
    table = many.stack([good, good])
    broken = jax.tree.map(lambda v: v.at[1].set(jnp.nan), table)

    @jax.jit
    def both(table: Any) -> Any:
        def loss(x: jax.Array) -> Any:
            route = many.route(lora.apply, form="gathered")
            y = route(base, table, jnp.array([0, 1, -1]), x)
            return y.sum(), y

        return jax.grad(loss, has_aux=True)(x)

    for actual, expected in zip(both(broken), both(table), strict=True):
        np.testing.assert_allclose(actual[::2], expected[::2], rtol=1e-5, atol=1e-5)
        assert np.isnan(actual[1]).any()


SIZES = np.array([2, 1, 1], np.int32)


def grouped(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x, w, jnp.asarray(SIZES))


@jax.custom_jvp
def own_derivative(x: jax.Array, w: jax.Array) -> jax.Array:
    return grouped(x, w)


own_derivative.defjvp(lambda xs, dxs: jax.jvp(grouped, xs, dxs))
WITHIN: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "jit": jax.jit(grouped),
    "checkpoint": jax.checkpoint(grouped),
    "scan": lambda x, w: jax.lax.scan(lambda x, _: (grouped(x, w), None), x, None, 2)[0],
    "loop": lambda x, w: jax.lax.fori_loop(0, 2, lambda _, x: grouped(x, w), x),
    "cond": lambda x, w: jax.lax.cond(x.sum() > 0, grouped, lambda x, w: -grouped(x, w), x, w),
    "platform": lambda x, w: jax.lax.platform_dependent(x, w, tpu=grouped, default=grouped),
    "jit in scan": lambda x, w: jax.lax.scan(
        lambda x, _: (jax.jit(grouped)(x, w), None), x, None, 2
    )[0],
}


def of_two(
    product: Callable[[jax.Array, jax.Array], jax.Array], rule: LoRA
) -> tuple[Any, list[Any], Callable[..., jax.Array], jax.Array]:
    """A base, two adapters and the empty one, `apply` of a batch, and three rows."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        return product(jnp.tanh(x[0] @ p["q"]), p["w"])[None]

    params, x = {"q": array(6, 6) / 2, "w": array(3, 6, 6) / 2}, array(3, 4, 6)
    lora = jlora.transform(apply, rule)
    base, adapter = jax.jit(lora.init)(jax.random.key(0), params, x[:1])
    adapters = [randomize(adapter), jax.tree.map(lambda v: v / 2, randomize(adapter)), {}]
    return base, adapters, lora.apply, x


@functools.partial(jax.jit, static_argnums=(0, 3))
def each_alone(apply: Any, base: Any, adapters: list[Any], ids: Any, x: jax.Array) -> jax.Array:
    """Each row under the adapter of its id, by itself."""
    rows = [apply(base, adapters[i], x[k : k + 1]) for k, i in enumerate(ids)]
    return jnp.concatenate(rows)


@pytest.mark.parametrize(("name", "pattern"), every(WITHIN, ["q", "q|w"], daily=[]))
def test_routed_experts_within_other_functions(name: str, pattern: str) -> None:
    """Adapted or not, in what JAX traces on its own; outside of a program."""
    base, adapters, apply, x = of_two(WITHIN[name], LoRA(pattern, rank=1))
    y = many.route(apply)(base, many.stack(adapters[:2]), jnp.array([0, 1, -1]), x)
    assert_close(y, each_alone(apply, base, adapters, (0, 1, 2), x), 1e-5)


@pytest.mark.parametrize("pattern", some(["q", "q|w"]))
def test_rows_of_a_vmap_within_route(pattern: str) -> None:
    """Each of the rows that `route` maps is mapped again."""
    base, adapters, apply, x = of_two(grouped, LoRA(pattern, rank=1))

    def twice(base: Any, adapter: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: apply(base, adapter, x[None])[0])(x)

    table, ids = many.stack(adapters[:2]), np.array([0, 0, 1])
    expected = each_alone(apply, base, adapters, (0, 0, 1), x)
    for of_ids in (ids, jnp.asarray(ids)):
        assert_close(many.route(twice)(base, table, of_ids, x), expected, 1e-5)


@pytest.mark.parametrize("pattern", some(["q", "q|w"], "q"))
def test_what_routed_experts_refuse(pattern: str) -> None:
    """A derivative within the function of `route`, and a product with a derivative of its own."""
    base, adapters, apply, x = of_two(grouped, LoRA(pattern, rank=1))
    table, ids = many.stack(adapters[:2]), jnp.array([0, 1, -1])

    def energy(base: Any, adapter: Any, x: jax.Array) -> jax.Array:
        return (apply(base, adapter, x) ** 2).sum()

    def slope(base: Any, adapter: Any, x: jax.Array) -> jax.Array:
        return jax.jvp(lambda x: apply(base, adapter, x), (x,), (x,))[1]

    for inner in (jax.grad(energy, 2), jax.grad(jax.jit(energy), 2), slope):
        routed = many.route(inner)
        for call in (routed, jax.jit(routed)):
            with refused(ValueError, "", "many.route", "Differentiate the routed function"):
                call(base, table, ids, x)
    jax.eval_shape(jax.grad(lambda x: many.route(energy)(base, table, ids, x).sum()), x)
    rule = LoRA(pattern, rank=1, materialize=True)
    base, adapters, apply, x = of_two(own_derivative, rule)
    with pytest.raises(NotImplementedError, match="ragged_dot vmap"):  # JAX's own
        many.route(apply)(base, many.stack(adapters[:2]), ids, x)


OUTER = [LoRA("up", rank=2, share="inputs"), LoRA("down", rank=2, share="outputs")]


def test_files(tmp_path: Folder) -> None:
    """PEFT gets a copy of a shared factor for each expert; a checkpoint keeps it once."""
    base, adapter, lora, x = make(*OUTER)
    adapter = randomize(adapter)
    read = come_back(tmp_path / "peft", base, adapter, NAMES)
    assert read["up"].a.shape == (3, 6, 2)
    assert (np.asarray(read["up"].a) == np.asarray(adapter["up"].a)).all()
    apply = jax.jit(lora.apply)
    actual, expected = apply(base, read, x), apply(base, adapter, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    checkpoint.save(tmp_path / "own", adapter, OUTER)
    again = checkpoint.restore(tmp_path / "own", like=adapter)
    assert jax.tree.structure(again) == jax.tree.structure(adapter)
    assert checkpoint.read(tmp_path / "own").rules == tuple(OUTER)


def test_a_start_is_of_one_experts_inputs() -> None:
    """A is drawn as wide where experts share B as where each has its own."""
    for share in (None, "inputs", "outputs"):
        adapter = make(LoRA(rank=2, share=share))[1]
        largest = {
            name: np.abs(np.asarray(x.a)).max() * np.sqrt(MIXTURE[name][1])
            for name, x in adapter.items()
        }
        assert all(0.6 < x <= 1 for x in largest.values()), largest


def shared(spec: str, *shape: int) -> Any:
    """`init` of a weight of this shape, under a rule that shares A."""
    lora = jlora.transform(lambda p, x: jnp.einsum(spec, x, p["w"]), LoRA("w", share="inputs"))
    return lora.init(jax.random.key(0), {"w": jnp.ones(shape)}, jnp.ones((*shape[:-2], 1, 4)))


REFUSED: dict[str, Any] = {
    "`share` ... LoRA('w') must be 'inputs', 'outputs' or None; got 'both'.": lambda: LoRA(
        "w", share="both"
    ),
    "`share` ... DoRA('w') ... (jlora.LoRA accepts 'outputs'); got 'outputs'.": lambda: DoRA(
        "w", share="outputs"
    ),
    "`share` ... LoRA('w') ... 'w' with shape (4, 3) has 0 stacked axes. Leave": lambda: shared(
        "bi,io->bo", 4, 3
    ),
    "`share` ... with shape (2, 2, 4, 3) has 2 stacked axes. Leave `share` out.": lambda: shared(
        "stbi,stio->stbo", 2, 2, 4, 3
    ),
}

test_refused = all_refused({ValueError: REFUSED})
