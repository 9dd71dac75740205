"""Modules of NNX with an adapter: what the transform computes, in NNX's own loop."""

import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from laws import assert_close, leaks_checked
from messages import all_refused, refused
from own_methods import Diagonal, Gain
from small import array, every, some

import jlora
from jlora import DoRA, Full, LoRA, Rows, checkpoint
from jlora.nnx import Adapted, adapt

ADAPTER = nnx.DiffState(0, nnx.LoRAParam)


class Layers(nnx.Module):
    """A dense layer, statistics, a mask, a counter and a head of fewer outputs."""

    def __init__(self, dtype: Any = jnp.float32) -> None:
        """Makes the layers."""
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(8, 16, param_dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(16, param_dtype=dtype, rngs=rngs)
        self.mask = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(16, 4, param_dtype=dtype, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))
        self.width = 16

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, 8) to (batch, 4)."""
        self.calls[...] += 1
        return self.down(self.encode(x, rngs))

    def encode(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, 8) to (batch, 16)."""
        return self.mask(jnp.tanh(self.norm(self.up(x))), rngs=rngs)


class Words(Layers):
    """The same of rows of a table."""

    def __init__(self, dtype: Any = jnp.float32) -> None:
        """Makes the layers and the table."""
        super().__init__(dtype)
        self.table = nnx.Embed(8, 8, param_dtype=dtype, rngs=nnx.Rngs(3))

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """(batch, 8) to (batch, 4)."""
        return super().__call__(self.table(x.argmax(-1)), rngs)


def inputs(dtype: Any = jnp.float32) -> jax.Array:
    return array(32, 8).astype(dtype)


def trained(rule: Any, dtype: Any = jnp.float32, model: Any = None) -> Adapted:
    """An adapted module whose B are not zero."""
    model = Layers(dtype) if model is None else model
    adapted = adapt(model, rule, rngs=nnx.Rngs(1), example=(inputs(dtype),))
    noisy = jax.tree.map(lambda x: x + jnp.ones((), x.dtype) / 8, adapted.adapter)
    return Adapted(adapted.base, noisy, rngs=nnx.Rngs(2))


# Every method, two of them somebody else's.
RULES = (
    LoRA("kernel", rank=2),
    DoRA("up/kernel", rank=2),
    Full("up/kernel"),
    Rows("table/embedding", range(2, 6)),
    Gain("up/kernel"),
    Diagonal("up/kernel"),
)


@pytest.mark.parametrize(
    ("rule", "dtype", "compiled"),
    every(
        RULES,
        [jnp.float32, jnp.bfloat16],
        [False, True],
        daily=[
            (RULES[1], jnp.bfloat16, True),
            (RULES[3], jnp.float32, False),
        ],
    ),
)
def test_a_call_is_that_of_the_transform(rule: Any, dtype: Any, compiled: bool) -> None:
    """In outputs, in what changes in the base, and in the merged module."""
    model = Words(dtype) if isinstance(rule, Rows) else Layers(dtype)
    adapted, x = trained(rule, dtype, model), inputs(dtype)
    graph, params, rest = nnx.split(nnx.clone(adapted.base), nnx.Param, ...)

    def call(params: Any, rest: Any, x: Any) -> Any:
        model = nnx.merge(graph, params, rest, copy=True)
        return model(x), nnx.state(model, nnx.Not(nnx.Param))

    apply = jax.jit(jlora.transform(call, rule).apply)
    expected, rest = apply(params, adapted.adapter, rest, x)
    merged = adapted.merge()
    run = nnx.jit(lambda model, x: model(x)) if compiled else lambda model, x: model(x)
    within = 1e-5 if dtype == jnp.float32 else 0.1
    for model in (adapted, merged):
        np.testing.assert_allclose(*map(np.float32, (run(model, x), expected)), within, within)
    for model in (adapted.base, merged):
        assert int(model.calls[...]) == 1
        assert int(model.mask.rngs.count[...]) == 1
        np.testing.assert_allclose(
            *map(np.float32, (model.norm.mean[...], rest.norm.mean[...])), within, within
        )


@pytest.mark.parametrize("options", some([{}, {"graph": False}], {"graph": False}))
def test_an_optimizer_trains_the_adapter_alone(options: dict[str, Any]) -> None:
    model = Layers()
    held = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    adapted = adapt(model, LoRA("kernel", rank=4), rngs=nnx.Rngs(1), example=(inputs(),))
    optimizer = nnx.Optimizer(adapted, optax.adamw(1e-2), wrt=nnx.LoRAParam)

    def loss_fn(model: Any, x: Any) -> Any:
        labels = x[:, :4].argmax(-1)
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

    def step(model: Any, optimizer: Any, x: Any) -> Any:
        loss, gradient = nnx.value_and_grad(loss_fn, argnums=ADAPTER)(model, x)
        optimizer.update(model, gradient)
        return loss

    step = nnx.jit(step, **options)
    losses = [float(step(adapted, optimizer, inputs())) for _ in range(60)]
    assert np.mean(losses[-5:]) < losses[0] - 0.5
    assert adapted.base is model
    assert int(model.calls[...]) == int(model.mask.rngs.count[...]) == 60
    now = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, now, held)
    if options:  # NNX returns the variables that have changed, and no copy of the others
        jax.tree.map(lambda x, y: pytest.fail("copied") if x is not y else None, now, held)


def test_lora_plus_says_what_to_chain_instead() -> None:
    """And that does what it does."""
    adapted = trained(LoRA("up/kernel", rank=2))
    with refused(TypeError, "", "jlora.lora_plus acts on", "nnx.Optimizer gives") as error:
        nnx.Optimizer(adapted, jlora.lora_plus(16), wrt=nnx.LoRAParam)
    remedy = eval(re.search(r"optax\.masked.*\)(?=\.$)", str(error.value))[0])
    state = nnx.state(adapted, nnx.LoRAParam)
    updates, _ = remedy.update(state, remedy.init(state))
    before, after = adapted.adapter["up"]["kernel"], updates["lora"]["up"]["kernel"]
    np.testing.assert_array_equal(after["a"][...], before.a)
    np.testing.assert_array_equal(after["b"][...], 16 * before.b)
    with refused(TypeError, "", "jlora.precondition", "Adapt a function of the module"):
        nnx.Optimizer(adapted, jlora.precondition(1e-6), wrt=nnx.LoRAParam)


def test_variables_of_hijax_are_refused() -> None:
    rngs = nnx.Rngs(0)
    with nnx.var_defaults(hijax=True):
        model = nnx.Linear(4, 8, rngs=rngs)
    with refused(TypeError, "params", "HijaxVariable", "flax.nnx.var_defaults(hijax=False)"):
        jlora.nnx.adapt(model, jlora.LoRA("kernel"), rngs=rngs, example=(jnp.ones((1, 4)),))


def test_a_base_that_a_start_changes_is_another_module() -> None:
    model = Layers()
    kernel = model.up.kernel[...]
    rule = LoRA("up/kernel", rank=2, init=jlora.initializers.pissa)
    adapted = adapt(model, rule, rngs=nnx.Rngs(1), example=(inputs(),))
    assert model.up.kernel.get_value() is kernel
    assert not np.array_equal(adapted.base.up.kernel[...], kernel)
    assert adapted.base.down.kernel.get_value() is model.down.kernel.get_value()
    np.testing.assert_allclose(adapted.merge().up.kernel[...], kernel, atol=1e-5)


def test_a_quantized_base() -> None:
    model = jlora.quantize(Layers(), jlora.Int8("kernel"))
    adapted = trained(LoRA("kernel", rank=2), model=model)
    adapted.eval()
    merged = adapted.merge()
    np.testing.assert_allclose(adapted(inputs()), merged(inputs()), atol=1e-5)


FORMS = {
    "jit": lambda f, m, x: jax.jit(f)(m, x),
    "vmap": lambda f, m, x: jax.vmap(f, (None, 0))(m, x[:, None]),
    "grad": lambda f, m, x: jax.grad(lambda x, m: f(m, x).sum())(x, m),
    "checkpoint": lambda f, m, x: jax.checkpoint(f)(m, x),
    "scan": lambda f, m, x: jax.lax.scan(lambda m, x: (m, f(m, x)), m, x[:, None])[1],
    "nnx.jit": lambda f, m, x: nnx.jit(f)(m, x),
    "nnx.grad": lambda f, m, x: nnx.grad(lambda x, m: f(m, x).sum())(x, m),
}
KINDS = {
    "statistics": lambda rngs: nnx.Sequential(
        nnx.Linear(8, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
    ),
    "mask": lambda rngs: nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)),
    "plain": lambda rngs: nnx.Linear(8, 8, rngs=rngs),
}


def result_of(call: Any) -> Any:
    """What a call returns, or the class of its error."""
    try:
        return call()
    except Exception as error:
        return type(error)


@pytest.mark.parametrize(
    ("kind", "form", "mode", "is_closed"),
    every(
        KINDS,
        FORMS,
        ["train", "eval"],
        [False, True],
        daily=[
            ("statistics", "jit", "train", True),
            ("statistics", "scan", "eval", True),
            ("mask", "vmap", "eval", True),
            ("mask", "grad", "eval", False),
            ("mask", "nnx.jit", "train", True),
            ("plain", "checkpoint", "train", True),
        ],
    ),
)
def test_it_goes_where_the_model_goes(kind: str, form: str, mode: str, is_closed: bool) -> None:
    """Through JAX's and NNX's transformations: the results, the state after it and the errors."""
    adapted = trained(LoRA(rank=2), model=KINDS[kind](nnx.Rngs(0)))
    getattr(adapted, mode)()
    found = []
    for model in (adapted, adapted.merge()):
        call = (lambda _, x, m=model: m(x)) if is_closed else (lambda m, x: m(x))
        result = result_of(lambda: FORMS[form](call, None if is_closed else model, inputs()))  # noqa: B023
        own = model.base if model is adapted else model
        found.append((result, nnx.to_pure_dict(nnx.state(own, (nnx.BatchStat, nnx.RngCount)))))
    (actual, state), (expected, expected_state) = found
    if isinstance(expected, type):
        assert actual is expected
    else:
        np.testing.assert_allclose(actual, expected, 1e-5, 1e-5)
    assert_close(state, expected_state)


def test_no_trace_outlives_the_call() -> None:
    adapted = trained(LoRA("kernel", rank=2))
    with leaks_checked():
        adapted(inputs())


def test_methods_are_adapted_and_attributes_read() -> None:
    adapted, x = trained(LoRA("up/kernel", rank=2)), inputs()
    adapted.eval()
    merged = adapted.merge()
    np.testing.assert_allclose(adapted.encode(x), merged.encode(x), atol=1e-5)
    found = adapted.run(lambda model, x: model.up(x), x)
    np.testing.assert_allclose(found, merged.up(x), atol=1e-5)
    assert adapted.width == 16
    np.testing.assert_array_equal(adapted.merged()(x), merged(x))  # another name
    assert inspect.signature(adapted.__call__) == inspect.signature(adapted.base.__call__)
    assert not hasattr(adapted, "layers")


class Scaled(nnx.Module):
    """A dense layer times a number, which a method sets."""

    def __init__(self) -> None:
        """Makes the layer, in a part of the model."""
        self.part, self.scale = nnx.Linear(8, 8, rngs=nnx.Rngs(0)), 1.0

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, 8) to (batch, 8)."""
        return self.scale * self.part(x)

    def set_scale(self, scale: float) -> None:
        """Sets the number."""
        self.scale = scale

    def steps(self, x: jax.Array) -> Any:
        """Yields what each of two calls in a row returns."""
        for _ in range(2):
            x = self(x)
            yield x

    def parts(self, x: jax.Array) -> Any:
        """Returns an iterator, which calls a part."""
        return map(self.part, [x])


@pytest.mark.parametrize("how", ["attribute", "method"])
def test_what_is_set_acts(how: str) -> None:
    """On the model itself, as does what its methods set."""
    adapted = trained(LoRA(rank=2), model=Scaled())
    before = adapted(inputs())
    if how == "method":
        adapted.set_scale(4.0)
    else:
        adapted.scale = 4.0
    assert adapted.scale == adapted.base.scale == adapted.merge().scale == 4.0
    assert "scale" not in vars(adapted)
    np.testing.assert_allclose(adapted(inputs()), 4 * before, 1e-5)
    adapted.note = "mine"  # which the model does not have
    assert adapted.note == "mine" and not hasattr(adapted.base, "note")


class Decoder(nnx.Module):
    """Attention that keeps the keys and values of earlier tokens."""

    def __init__(self) -> None:
        """Makes the layer, in which None stands where the caches will be."""
        self.attention = nnx.MultiHeadAttention(2, 8, decode=True, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, 1, 8) to (batch, 1, 8)."""
        return self.attention(x)

    def start(self, batch: int) -> None:
        """Makes the caches."""
        self.attention.init_cache((batch, 4, 8))


def test_a_cache_that_a_method_makes() -> None:
    def example(model: Any) -> Any:
        model.start(2)
        return model(jnp.ones((2, 1, 8)))

    adapted = adapt(Decoder(), LoRA(rank=2), rngs=nnx.Rngs(1), example=example)
    adapted = Adapted(adapted.base, jax.tree.map(lambda x: x + 0.1, adapted.adapter))
    models = adapted, adapted.merge()
    for model in models:
        model.start(2)
    call = nnx.jit(lambda model, x: model(x))
    for x in array(3, 2, 1, 8):
        np.testing.assert_allclose(*(call(model, x) for model in models), 1e-5, 1e-5)
    states = [nnx.to_pure_dict(nnx.state(x, nnx.Cache)) for x in (adapted.base, models[1])]
    assert_close(*states)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(states[0]))


def test_generators() -> None:
    """Their steps run after the call: as methods of the adapted module, or not at all."""
    adapted, x = trained(LoRA(rank=2), model=Scaled()), inputs()
    for found, expected in zip(adapted.steps(x), adapted.merge().steps(x), strict=True):
        np.testing.assert_allclose(found, expected, 1e-5, 1e-5)
    with refused(TypeError, "f", "returned a map, whose steps would run when the adap"):
        adapted.parts(x)


def test_routes_of_a_model_with_state() -> None:
    model = KINDS["mask"](nnx.Rngs(0))
    model.eval()
    adapted, x = trained(LoRA(rank=2), model=model), inputs()[:3]
    table = jlora.many.stack([adapted.adapter] * 2)
    routed = jlora.many.route(lambda base, adapter, x: Adapted(base, adapter)(x))
    found = routed(model, table, jnp.array([0, -1, 1]), x)
    expected = jnp.stack([adapted(x)[0], model(x)[1], adapted(x)[2]])
    np.testing.assert_allclose(found, expected, 1e-5, 1e-5)


def test_state_among_the_arguments_changes_there() -> None:
    adapted, rngs = trained(LoRA("up/kernel", rank=2)), nnx.Rngs(5)
    adapted(inputs(), rngs=rngs)
    assert int(rngs.default.count[...]) == 1
    assert int(adapted.base.mask.rngs.count[...]) == 0
    count = nnx.Variable(jnp.array(0))

    def call(model: Any, count: Any) -> Any:
        count[...] += 1
        return model.width

    assert adapted.run(call, count) == 16
    assert int(count[...]) == 1


def test_dropout_of_the_low_rank_path() -> None:
    """Each call has another mask; `eval` and a module without `rngs` have none."""
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    adapted = trained(LoRA("kernel", rank=2, dropout=0.5), model=model)
    x, merged = inputs(), adapted.merge()(inputs())
    first, second = adapted(x), adapted(x)
    assert not np.allclose(first, second)
    assert int(adapted.rngs.count[...]) == 2
    adapted.eval()
    np.testing.assert_allclose(adapted(x), merged, atol=1e-5)
    adapted.train()
    assert not np.allclose(adapted(x), merged)
    bare = Adapted(model, adapted.adapter)
    np.testing.assert_allclose(bare(x), merged, atol=1e-5)


@pytest.mark.parametrize("options", [None, {}, {"graph": False}])
def test_another_adapter_is_assigned(options: dict[str, Any] | None) -> None:
    """Also in a compiled step, and one of another rank; the optimizer goes on with it."""
    adapted, x = trained(LoRA("kernel", rank=2)), inputs()
    adapted.eval()
    best, expected = adapted.adapter, adapted(x)
    optimizer = nnx.Optimizer(adapted, optax.sgd(0.1), wrt=nnx.LoRAParam)
    step = nnx.jit(lambda m, o: o.update(m, nnx.grad(lambda m: m(x).sum(), argnums=ADAPTER)(m)))
    step(adapted, optimizer)
    assert not np.allclose(adapted(x), expected)
    put = lambda model, adapter: setattr(model, "adapter", adapter)  # noqa: E731
    (put if options is None else nnx.jit(put, **options))(adapted, best)
    np.testing.assert_allclose(adapted(x), expected, atol=1e-5)
    assert_close(adapted.adapter, best)
    step(adapted, optimizer)
    assert not np.allclose(adapted(x), expected)
    adapted.adapter = other = trained(LoRA("kernel", rank=4)).adapter
    assert adapted.adapter["up"]["kernel"].a is other["up"]["kernel"].a


def test_state_is_not_lost_with_the_adapter(tmp_path: Any) -> None:
    """Of a module with statistics no checkpoint is written; the adapter alone is."""
    adapted, rules = trained(LoRA("kernel", rank=2)), [LoRA("kernel", rank=2)]
    for write in (checkpoint.save, lambda _, *args: checkpoint.items(*args)):
        with refused(ValueError, "adapter", "norm/mean, norm/var", "Give adapted.adapter"):
            write(tmp_path / "a", adapted, rules)
    checkpoint.save(tmp_path / "a", adapted.adapter, rules)
    adapted = trained(LoRA("layers/0/kernel", rank=2), model=KINDS["mask"](nnx.Rngs(0)))
    checkpoint.save(tmp_path / "b", adapted, [LoRA("layers/0/kernel", rank=2)])
    again = Adapted(KINDS["mask"](nnx.Rngs(0)), checkpoint.restore(tmp_path / "b"))
    adapted.eval()
    again.eval()
    np.testing.assert_array_equal(again(inputs()), adapted(inputs()))


def test_no_adapter_is_the_model() -> None:
    model = Layers()
    model.eval()
    np.testing.assert_array_equal(Adapted(model, {})(inputs()), model(inputs()))


def test_without_values() -> None:
    """Made under `eval_shape` and `jit`, and with shapes as the example."""
    shape = jax.ShapeDtypeStruct((32, 8), jnp.float32)

    def make() -> Adapted:
        return adapt(Layers(), LoRA("kernel", rank=2), rngs=nnx.Rngs(1), example=(shape,))

    abstract, made = nnx.eval_shape(make), nnx.jit(make)()
    assert jax.tree.map(jnp.shape, abstract.adapter) == jax.tree.map(jnp.shape, made.adapter)
    assert made.adapter["up"]["kernel"].a.shape == (8, 2)


def test_an_example_of_another_call() -> None:
    call = lambda model: model.encode(inputs())  # noqa: E731
    adapted = adapt(Layers(), LoRA(rank=2), rngs=nnx.Rngs(1), example=call)
    assert list(adapted.adapter) == ["up"]  # which alone is used by that


@pytest.mark.parametrize("use", ["stack", "merge", "init", "summary", "plan", "apply", "dropout"])
def test_a_tree_is_not_the_module(use: str) -> None:
    """Its leaves are those of the base and of the adapter."""
    adapted, x, key = trained(LoRA(rank=2), model=Scaled()), inputs(), jax.random.key(0)
    lora = jlora.transform(lambda model, x: model(x), LoRA(rank=2))
    uses = {
        "stack": lambda: jlora.many.stack([adapted]),
        "merge": lambda: jlora.merge(adapted, adapted.adapter),
        "init": lambda: lora.init(key, adapted, x),
        "summary": lambda: jlora.summary(adapted.base, adapted),
        "plan": lambda: jlora.plan(lambda a, b, x: 0.0, adapted.base, adapted, (x,)),
        "apply": lambda: lora.apply(adapted.base, adapted, x),
        "dropout": lambda: jlora.dropout(adapted, key),
    }
    match = (
        r"`(base|adapter|params)` must be .*; got the module Adapted, which holds both\. Give its"
    )
    with pytest.raises(TypeError, match=match):
        uses[use]()


RNGS, CALL, UP = nnx.Rngs(0), (inputs(),), LoRA("up/kernel", rank=2)
MISTAKES: dict[type[Exception], dict[str, Any]] = {
    TypeError: {
        "`rngs` ... got": lambda: adapt(Layers(), LoRA(), rngs=jax.random.key(0), example=CALL),
        "`example` ... must be the tuple of the arguments": lambda: adapt(
            Layers(), LoRA(), rngs=RNGS, example=inputs()
        ),
        "`model` ... got function": lambda: adapt(lambda x: x, LoRA(), rngs=RNGS, example=CALL),
    },
    ValueError: {
        "LoRA('kernol') ... Near misses:": lambda: adapt(
            Layers(), LoRA("kernol"), rngs=RNGS, example=CALL
        ),
        "`model` ... must not have nnx.LoRAParams ... at lora/up/kernel/a": lambda: adapt(
            trained(UP), LoRA(), rngs=RNGS, example=CALL
        ),
        "`rngs` ... or 'default'; got dropout. Give nnx": lambda: adapt(
            Layers(), LoRA(), rngs=nnx.Rngs(dropout=0), example=CALL
        ),
        "`rngs` ... must have the stream 'dropout' ... or add dropout=0": lambda: adapt(
            Layers(), LoRA(dropout=0.1), rngs=nnx.Rngs(params=0), example=CALL
        ),
        "`adapter` ... other/kernel ... not in `base`": lambda: Adapted(
            Layers(), {"other": trained(UP).adapter["up"]}
        ),
        "`adapter` ... up/kernel ... expected shape": lambda: setattr(
            trained(UP), "adapter", {"up": {"kernel": jnp.ones(3)}}
        ),
    },
    AttributeError: {
        "calls of 'up', a part of the model, ... or read adapted.base.up": lambda: trained(UP).up,
    },
}


test_mistakes = all_refused(MISTAKES)
