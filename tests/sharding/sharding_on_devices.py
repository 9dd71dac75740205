"""An adapter on a mesh of eight devices, in float64.

By hand: XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_ENABLE_X64=1 pytest -n 0 FILE
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sharding_models as models
from jax.sharding import AxisType, reshard
from jax.sharding import PartitionSpec as P
from meshes import assert_lies, compiled, mesh_of, moved, on, put
from small import assert_close, some

import jlora
from jlora import DoRA, LoRA, Slots, sharding
from jlora._tree import size_in_bytes
from tests.adapters.test_every_method import of_rule

AUTO, EXPLICIT = mesh_of(), mesh_of(AxisType.Explicit)


def placed(model):
    """Parameters, adapter and arguments on the mesh."""
    adapter, base = models.adapter_of(model), put(model.params, AUTO, model.base)
    return base, put(adapter, AUTO, sharding.specs(model.base, adapter)), put(model.args, AUTO, ROW)


close = functools.partial(assert_close, tolerance=1e-9, least=1.0)


def loss_of(lora):
    """A scalar of the outputs that depends on all of them, and the outputs."""

    def loss(adapter, base, *args):
        y = lora.apply(base, adapter, *args)
        return jnp.mean(jnp.square(y) * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

    return loss


ROW = P("fsdp")

# ----------------------------------------------------------------------------- automatic axes


@pytest.fixture(params=some(models.MODELS, "scanned"))
def model(request):
    """Each of the models."""
    return models.MODELS[request.param]()


def test_a_start_and_a_step_are_those_of_one_device(model):
    """Made where `out_shardings` says, with its state; outputs, gradients, updates are the same."""
    lora = jlora.transform(model.apply, *model.rules)
    tx = jlora.optimizer(optax.chain(optax.adamw(1e-2), jlora.lora_plus(4)))
    base, adapter, args = placed(model)

    def init(key, base, *args):
        return lora.init(key, base, *args)[1]

    key, shapes = jax.random.key(0), jax.eval_shape(init, jax.random.key(0), base, *args)
    places = sharding.specs(base, shapes)
    started = jax.jit(init, out_shardings=places)(key, base, *args)
    assert_lies(started, places)
    close(started, jax.jit(init)(key, model.params, *model.args))
    assert jax.tree.leaves(sharding.specs(base, started)) == jax.tree.leaves(places)

    def step(adapter, state, base, *args):
        gradient, y = jax.grad(loss_of(lora), has_aux=True)(adapter, base, *args)
        updates, state = tx.update(gradient, state, adapter)
        return y, gradient, optax.apply_updates(adapter, updates), state

    state_places = sharding.moments(jax.eval_shape(tx.init, adapter), adapter, places)
    state = jax.jit(tx.init, out_shardings=state_places)(adapter)
    assert_lies(state, state_places)
    out = (None, places, places, state_places)
    found = jax.jit(step, out_shardings=out)(adapter, state, base, *args)
    alone = models.adapter_of(model)
    expected = jax.jit(step)(alone, tx.init(alone), model.params, *model.args)
    close(found[:2], expected[:2])
    close(found[2:], expected[2:], tolerance=1e-5)  # Adam divides by gradients near zero


@pytest.mark.parametrize("name", some(["merge", "unmerge"], "merge"))
def test_merging_moves_nothing(model, name):
    """From one device to another; but B of a slot lies on all, its columns of W on some of them."""
    base, adapter, _ = placed(model)
    f = getattr(jlora, name)
    expected = f(model.params, models.adapter_of(model))
    program = compiled(f, base, adapter)
    for merged in (f(base, adapter), program(base, adapter)):
        assert_lies(merged, base)
        close(merged, expected)
    has_slots = any(isinstance(r, LoRA) and r.slots for r in model.rules)
    most = 3 * max(x.size for x in jax.tree.leaves(adapter)) if has_slots else 0
    assert max((size for _, size in moved(program)), default=0) <= most


def test_a_start_holds_nothing_whole():
    """A base and an adapter made on the mesh: no device ever has a whole weight, or a whole A."""
    layers, d, rank = 8, 512, 64
    model = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]  # noqa: E731
    lora = jlora.transform(model, LoRA(rank=rank, init=jlora.initializers.gaussian))
    base = on(AUTO, {"w": P(None, "fsdp", "tensor")})

    def start(key):
        params = {"w": jax.random.normal(key, (layers, d, d), jnp.float32)}
        return lora.init(key, params, jax.ShapeDtypeStruct((1, d), jnp.float32))

    shapes = jax.eval_shape(start, jax.random.key(0))
    both = (base, sharding.specs(base, shapes[1]))
    for f, tree, place in ((start, shapes[0], both), (lambda k: start(k)[1], shapes[1], both[1])):
        compiled = jax.jit(f, out_shardings=place).lower(jax.random.key(0)).compile()
        used = compiled.memory_analysis()
        assert used.temp_size_in_bytes + used.output_size_in_bytes < size_in_bytes(tree)
    assert used.output_size_in_bytes < 0.4 * size_in_bytes(shapes[1])


# ------------------------------------------------------------------------------ explicit axes

D, F, V, B = 16, 32, 24, 8


def tied(p, ids):
    """A table divided by rows, looked up and multiplied with."""
    h = jnp.tanh(p["w"].at[ids].get(out_sharding=P("fsdp", None)))
    return jnp.einsum("bd,vd->bv", h, p["w"], out_sharding=P("fsdp", "tensor"))


def gathered(p, x):
    """Weights are gathered along fsdp before the product, as FSDP does."""
    h = jax.nn.relu(x @ reshard(p["w"], P(None, "tensor")))
    v = reshard(p["v"], P("tensor", None))
    return jnp.einsum("bf,fd->bd", h, v, out_sharding=P("fsdp", None))


def layers(p, x):
    """A scan over remat."""
    body = jax.checkpoint(lambda x, w: (jnp.tanh(gathered(w, x)), None))
    return jax.lax.scan(body, x, p)[0]


def heads(p, x):
    """Several axes of outputs and of inputs; both products contract a divided one."""
    h = jnp.einsum("bd,dhk->bhk", x, p["q"], out_sharding=P("fsdp", "tensor", None))
    return jnp.einsum("bhk,hkd->bd", h, p["o"], out_sharding=P("fsdp", None))


def fused(p, x):
    """Three products in one."""
    q, k, v = jnp.split(x @ p["w"], 3, axis=-1)
    return jnp.tanh(q) * k + v


def experts(p, x):
    """A batch axis that is divided."""
    return jnp.tanh(jnp.einsum("ebd,edf->ebf", x, p["w"]))


def by_token(p, x):
    """The matrix of each row is looked up."""
    w = p["w"].at[jnp.arange(B) % 2].get(out_sharding=P("fsdp", None, "tensor"))
    return jnp.einsum("bd,bdf->bf", x, w)


def offloaded(p, x):
    """A scan moves each layer from the memory of the host, and gathers it."""

    def layer(x, w):
        w = reshard(jax.device_put(w, jax.memory.Space.Device), P(None, "tensor"))
        return reshard(jnp.tanh(x @ w), P("fsdp", None)), None

    return jax.lax.scan(layer, x, p["w"])[0]


def joined(p, x):
    """Two leaves in one product."""
    return jnp.tanh(x @ jnp.concatenate([p["w"], p["v"]], 1))


def transposed(p, x):
    """Transposed and reshaped."""
    return jnp.tanh(x @ p["w"].T) @ p["v"].reshape(F, 8)


def automatic(p, x):
    """A region in which XLA decides."""
    inner = jax.sharding.auto_axes(lambda w, x: jnp.tanh(x @ w))
    return inner(p["w"], x, out_sharding=P("fsdp", "tensor"))


def mapped(p, x):
    """By hand."""

    def local(w, x):
        h = x @ jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
        return jnp.tanh(jax.lax.all_gather(h, "tensor", axis=1, tiled=True))

    specs = (P("fsdp", "tensor"), P("fsdp", None))
    return jax.shard_map(local, in_specs=specs, out_specs=P("fsdp", None), check_vma=False)(
        p["w"], x
    )


def convolved(p, x):
    """A convolution whose channels are divided."""
    image = x[:, None, :, None] * jnp.ones((3,))
    return jax.lax.conv_general_dilated(
        image,
        p["w"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        out_sharding=P("fsdp", None, None, "tensor"),
    )


def formed(p, x):
    """No factored form, of a weight that is sharded along its other axis."""
    w = jnp.abs(reshard(p["w"], P("tensor", None)))
    return jnp.tanh(jnp.einsum("bd,df->bf", x, w, out_sharding=P("fsdp", None)))


IDS = (jax.random.randint(jax.random.key(1), (B,), 0, V), P("fsdp"))
ROWS = (models.normal(2, B, D), P("fsdp", None))
PAIR = {"w": ((D, F), P("fsdp", "tensor")), "v": ((F, D), P("tensor", "fsdp"))}
STACK = {name: ((3, *shape), P(None, *spec)) for name, (shape, spec) in PAIR.items()}
TABLE = {"w": ((V, D), P("tensor", "fsdp"))}
COLUMN = {"w": ((D, F), P(None, "tensor"))}
RULE = LoRA(rank=2)
CASES = [
    (tied, TABLE, IDS, LoRA("w", rank=2)),
    (layers, STACK, ROWS, RULE),
    (
        heads,
        {"q": ((D, 4, 8), P("fsdp", "tensor")), "o": ((4, 8, D), P("tensor", None, "fsdp"))},
        ROWS,
        RULE,
    ),
    (fused, {"w": ((D, 3 * F), P(None, "tensor"))}, ROWS, LoRA(rank=2, slots=Slots(3, (0, 2)))),
    (
        experts,
        {"w": ((4, D, F), P("fsdp", None, "tensor"))},
        (models.normal(2, 4, B, D), P("fsdp")),
        RULE,
    ),
    (by_token, {"w": ((2, D, F), P(None, "fsdp", "tensor"))}, ROWS, RULE),
    (offloaded, {"w": ((3, D, D), P(None, "fsdp", "tensor"))}, ROWS, RULE),
    (joined, {"w": ((D, F), P(None, "tensor")), "v": ((D, F), P(None, "tensor"))}, ROWS, RULE),
    (
        transposed,
        {"w": ((F, D), P(None, None)), "v": ((4, 8, 8), P("tensor"))},
        ROWS,
        LoRA("w", rank=2),
    ),
    (automatic, COLUMN, ROWS, RULE),
    (mapped, {"w": PAIR["w"]}, ROWS, RULE),
    (convolved, {"w": ((1, 3, 3, F), P(None, None, None, "tensor"))}, ROWS, RULE),
    (formed, COLUMN, ROWS, LoRA("w", rank=2, materialize=True)),
]


def squares(tree):
    """The sum of the squares of all leaves."""
    return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("case", some(CASES, CASES[3]), ids=lambda case: case[0].__name__)
@pytest.mark.parametrize("method", some([LoRA, DoRA], LoRA))
@pytest.mark.parametrize("follow", some([True, False], True))
def test_explicit(case, method, follow):
    """Outputs lie as the base model's; they and all derivatives are those of one device.

    For an adapter that follows W, and for one that is everywhere, eagerly too.
    """
    f, weights, (x, x_spec), rule = case
    rule = rule if method is LoRA else of_rule(rule, method)
    lora = jlora.transform(f, rule)
    loss, specs = loss_of(lora), {name: spec for name, (_, spec) in weights.items()}
    params = {n: models.normal(i, *s) for i, (n, (s, _)) in enumerate(weights.items())}
    grad = jax.grad(loss, (0, 1), has_aux=True)

    def everything(base, adapter, args):
        (gradient, of_base), y = grad(adapter, base, args)
        second = jax.grad(lambda a: squares(grad(a, base, args)[0][0]))(adapter)
        merged = jlora.merge(base, adapter)
        found = {"y": y, "gradient": gradient, "second": second}
        return f(base, args), found | {"of_base": of_base, "merged": merged}

    def run(mesh):
        with jax.set_mesh(mesh):
            base, args = jax.device_put((params, x), (specs, x_spec))
            base = jax.device_put(base, jax.memory.Space.Host) if f is offloaded else base
            _, adapter = jax.jit(lora.init)(jax.random.key(0), base, args)
            adapter = jax.jit(lambda tree: jax.tree.map(lambda x: x + 0.1, tree))(adapter)
            if follow:
                adapter = jax.device_put(adapter, sharding.specs(base, adapter))
            plain, outs = jax.jit(everything)(base, adapter, args)
            assert jax.typeof(outs["y"]).sharding == jax.typeof(plain).sharding
            assert_lies([outs[n] for n in ("gradient", "of_base", "merged")], [adapter, base, base])
            if not follow:
                outs["unmerged"] = jlora.unmerge(base, adapter) if method is LoRA else base
                outs["eager"] = lora.apply(base, adapter, args)
                assert_lies(outs["unmerged"], base)
        return outs

    close(run(EXPLICIT), run(mesh_of(AxisType.Explicit, (1, 1))))


@pytest.mark.slow
def test_explicit_many_adapters():
    """`vmap` over adapters, and dropout."""
    lora = jlora.transform(gathered, LoRA(rank=2, dropout=0.5))
    with jax.set_mesh(EXPLICIT):
        base = {n: jax.device_put(models.normal(0, *s), p) for n, (s, p) in PAIR.items()}
        x = jax.device_put(*ROWS)
        _, adapter = lora.init(jax.random.key(0), base, x)
        adapter = jax.device_put(
            jax.tree.map(jnp.ones_like, adapter), sharding.specs(base, adapter)
        )
        three = jax.tree.map(lambda a: jnp.stack([a, 2 * a, 3 * a]), adapter)
        found = jax.jit(jax.vmap(lora.apply, (None, 0, None)))(base, three, x)
        each = [lora.apply(base, jax.tree.map(lambda a, n=n: n * a, adapter), x) for n in (1, 2, 3)]
        close(found, jnp.stack(each))
        noisy = functools.partial(jlora.dropout, key=jax.random.key(1))
        dropped = jax.jit(lambda a: lora.apply(base, noisy(a), x))(adapter)
        assert jax.typeof(dropped).sharding == jax.typeof(each[0]).sharding
        assert not np.allclose(dropped, each[0])


def test_explicit_ambiguity_is_an_error_of_jax():
    """What the base model may not leave open, the adapted one may not either."""
    lora = jlora.transform(lambda p, x: x @ p["w"], LoRA(rank=2))
    with (
        jax.set_mesh(EXPLICIT),
        pytest.raises(Exception, match="Contracting dimensions are sharded and it is ambiguous"),
    ):
        base = {"w": jax.device_put(models.normal(0, D, F), P("fsdp", None))}
        lora.init(jax.random.key(0), base, jax.device_put(models.normal(1, B, D), P(None, "fsdp")))
