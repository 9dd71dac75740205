"""`sketch`, and the starts from it: the singular vectors are those of the dense matrix."""

import dataclasses
import functools
import pickle
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from cases import CASES, Case
from messages import all_refused, refused
from nodes import matrices
from sketch_models import MODELS, Model, normal, of_all
from small import some

import jlora
from jlora import DoRA, Full, LoRA
from jlora._sketching import _kinds as kinds
from jlora.initializers import eva, lora_ga

slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def each_model(*daily: str) -> Any:
    """Some models every day, the others in the long run."""
    return pytest.mark.parametrize("name", some(MODELS, *daily))


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    scale = max(np.abs(expected).max(), 1e-6)
    np.testing.assert_allclose(np.asarray(actual) / scale, expected / scale, rtol=0, atol=tolerance)


def as_matrices(s: jlora.types.Spectrum) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Of each matrix the vectors along the inputs, the values, and those along the outputs."""
    n, k = s.total.size, s.values.shape[-1]
    outputs = None if s.outputs is None else np.asarray(s.outputs).reshape(n, k, -1)
    return np.asarray(s.inputs).reshape(n, -1, k), np.asarray(s.values).reshape(n, k), outputs


# ------------------------------------------------------------------- all singular vectors there are


def whole(name: str, kind: str) -> tuple[Model, list[Any], jlora.types.Sketch]:
    """A model, two batches, and all that they tell."""
    model = MODELS[name]()
    batches = [model.batch(1), model.batch(2)]
    found = jlora.sketch(model.loss, model.params, model.rules, batches, kind=kind, components=99)
    return model, batches, found


once = functools.cache(whole)


@each_model("fused")
def test_inputs_are_those_of_all_batches(name: str) -> None:
    """V·diag(values²)·Vᵀ is the covariance as the model is written; V is orthonormal."""
    model, batches, found = once(name, "inputs")
    expected = of_all(model, batches)
    assert found.sites.keys() == expected.keys()
    for path, s in found.sites.items():
        v, values, _ = as_matrices(s)
        if v.shape[1] == v.shape[2]:  # no fewer outputs than inputs
            close((v * values[:, None] ** 2) @ v.mT, expected[path])
        wanted = np.linalg.eigvalsh(expected[path])[:, ::-1][:, : values.shape[1]]
        close(values**2, np.maximum(wanted, 0))
        close(s.total.ravel(), np.trace(expected[path], axis1=1, axis2=2))
        close(v.mT @ v, np.broadcast_to(np.eye(v.shape[2]), (len(v), *2 * v.shape[2:])))


def by_path(tree: Any) -> dict[str, Any]:
    return {"/".join(path): x for path, x in jlora._tree.leaves_by_path(tree)}


FIT = [c for c in CASES if c.sites and c.grad and c.jit and c.float64]


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[] if c.name == "used_twice" else slow) for c in FIT]
)
def test_gradient_is_that_of_all_batches(case: Case) -> None:
    """Of every model of the tables: U·diag(values)·V is the gradient, as its SVD has it."""
    with laws.precision(case, jnp.float64):
        problem = case.build(jnp.float64)
        halved = jax.tree.map(lambda x: x / 2 if x.dtype == jnp.float64 else x, problem.args)
        batches = [problem.args, halved]

        def loss(params: Any, args: Any) -> jax.Array:
            return laws.scalar(problem.apply(params, *args, **problem.kwargs))

        found = jlora.sketch(
            loss, problem.params, case.rules, batches, kind="gradient", components=999
        )
        gradient = jax.jit(jax.grad(loss, allow_int=True))
        # Not that of the mean: a custom derivative may be nonlinear in the cotangent.
        gradients = [by_path(gradient(problem.params, args)) for args in batches]
    assert len(found.sites) == case.sites
    for path, s in found.sites.items():
        g = matrices(sum(each[path] for each in gradients) / 2, s.layout)
        g = g.reshape(-1, *g.shape[-2:])
        u, values, v = as_matrices(s)
        assert v is not None
        close((u * values[:, None]) @ v, g, 1e-9)
        close(values, np.linalg.svd(g, compute_uv=False), 1e-9)
        close(s.total.ravel(), (g**2).sum((1, 2)), 1e-9)


# ------------------------------------------------------------------------------- the leading ones


def decaying(seed: int, n: int, m: int, power: float) -> np.ndarray:
    """A matrix with the singular values 1, 2^-power, 3^-power and so on."""
    u, v = (np.linalg.qr(normal(s, k, min(n, m)))[0] for s, k in ((seed, n), (seed + 1, m)))
    return (u * (1 + np.arange(min(n, m))) ** -power) @ v.T


@pytest.mark.parametrize("kind", some(kinds.KINDS, "inputs"))
def test_few_of_many(kind: str) -> None:
    """Four of 64: values to 1e-3, and the rest as a whole to a tenth."""
    x = jnp.asarray(decaying(0, 200, 64, 0.6))
    x = x - x.mean(0)
    loss = lambda p, x: jnp.sum(jnp.cos(x @ p["w"]))  # noqa: E731
    params, rule = {"w": normal(3, 64, 48)}, LoRA("w", rank=2)
    found = jlora.sketch(loss, params, rule, [x[:100], x[100:]], kind=kind).sites["w"]
    expected = np.asarray(x) if kind == "inputs" else np.asarray(jax.grad(loss)(params, x)["w"]) / 2
    u, values, v = np.linalg.svd(expected, full_matrices=False)
    assert found.values.shape == (4,)
    np.testing.assert_allclose(found.values, values[:4], rtol=1e-3)
    np.testing.assert_allclose(found.total, (values**2).sum(), rtol=0.1)
    along = v.T if kind == "inputs" else u
    overlap = np.linalg.svd(along[:, :4].T @ found.inputs, compute_uv=False)
    assert overlap.min() > 0.99
    sketch = functools.partial(jlora.sketch, loss, params, rule, [x], kind=kind)
    one, same, other = (sketch(key=jax.random.key(i)).sites["w"] for i in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert np.any(one.inputs != other.inputs)
    more = sketch(passes=24).sites["w"]
    assert np.linalg.svd(along[:, :4].T @ more.inputs, compute_uv=False).min() > 1 - 1e-6


# ------------------------------------------------------------------------------ what inputs count

WIDTH = 6


def attention(p: Any, batch: Any) -> jax.Array:
    """Two layers that look at what `mask` shows, and the mean of those positions."""
    x, mask = batch
    for i in range(2):
        q, k, v = (x @ p[name][i] for name in "qkv")
        scores = jnp.where(mask[:, None], q @ k.mT, jnp.finfo(x.dtype).min)
        x = x + jnp.tanh(jax.nn.softmax(scores) @ v)
    return jnp.sum(jnp.sin(x).sum(-1) * mask)


@slow
@pytest.mark.parametrize("kind", kinds.KINDS)
def test_padding_does_not_count(kind: str) -> None:
    params = {name: normal(i, 2, WIDTH, WIDTH) for i, name in enumerate("qkv")}
    x, lengths = normal(5, 2, 7, WIDTH), (7, 4)
    mask = jnp.arange(7) < jnp.asarray(lengths)[:, None]
    parts = [(x[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate(lengths)]
    f = functools.partial(
        jlora.sketch, attention, params, LoRA(rank=1), kind=kind, components=WIDTH
    )
    padded, apart = f([(x, mask)]), f(parts)
    n = len(parts) if kind == "gradient" else 1  # the mean of the losses
    for path, s in padded.sites.items():
        close(s.values, n * np.asarray(apart.sites[path].values))


@slow
def test_inputs_in_bfloat16() -> None:
    """Counts do not round: beyond 256 tokens bfloat16 has no odd numbers."""
    x = (normal(0, 1111, 8) + 1).astype(jnp.bfloat16)
    params = {"w": normal(1, 8, 8).astype(jnp.bfloat16)}
    loss = lambda p, x: jnp.sum((x @ p["w"]).astype(jnp.float32) ** 2)  # noqa: E731
    found = jlora.sketch(loss, params, LoRA("w", rank=4), [x], kind="inputs").sites["w"]
    assert found.values.dtype == jnp.float32
    z = np.asarray(x, np.float64)
    expected = np.linalg.svd(z - z.mean(0), compute_uv=False)
    np.testing.assert_allclose(found.values, expected, rtol=1e-2)


@each_model("fused")
def test_what_observes_changes_nothing(name: str) -> None:
    """Not the loss, nor a gradient that passes through the sites."""
    model = MODELS[name]()
    batch = model.batch(1)
    sites = jlora.transform(model.loss, *model.rules).sites(model.params, batch)
    sketched, key = {s.path: kinds.Inputs.of(s, 2) for s in sites}, jax.random.key(0)
    probes = {path: s.node(0, s.basis(0, False, None, key), key) for path, s in sketched.items()}
    f = lambda params: jax.value_and_grad(jlora.wrap(model.loss), argnums=1)(params, batch)  # noqa: E731
    actual, expected = jax.jit(f)(jlora.bind(model.params, probes)), jax.jit(f)(model.params)
    jax.tree.map(close, actual, expected)


# ---------------------------------------------------------------------------- bases, meshes, memory


@slow
@pytest.mark.parametrize("kind", kinds.KINDS)
def test_of_a_quantized_base(kind: str) -> None:
    """As of what its codes stand for."""
    model = layers_of(64, 32)
    params = jlora.quantize(model.params, jlora.NF4("up|down"))
    f = functools.partial(jlora.sketch, model.loss, kind=kind, batches=[model.batch(1)])
    found, expected = (
        f(p, rules=LoRA(rank=1), components=32) for p in (params, jlora.dequantize(params))
    )
    for path, s in found.sites.items():
        close(s.values, expected.sites[path].values)


def layers_of(d: int, f: int) -> Model:
    params = {"up": normal(0, 3, d, f) / 8, "down": normal(1, 3, f, d) / 8}
    return MODELS["scan"]()._replace(params=params, batch=lambda seed: normal(seed, 2, 9, d))


@pytest.mark.parametrize("packed", some([False, True], False))
@pytest.mark.parametrize("kind", some(kinds.KINDS, "gradient"))
def test_memory_is_that_of_a_training_step(kind: str, packed: bool) -> None:
    """Of a LoRA of as many columns; no gradient of the size of a W, nor another one."""
    d, f = 512, 256
    model = layers_of(d, f)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), model.params)
    x = model.batch(1).astype(jnp.float32)
    if packed:
        params = jlora.quantize(params, jlora.NF4("up|down"))
    sites = jlora.transform(model.loss, LoRA(rank=4)).sites(params, x)
    sketched, key = {s.path: kinds.KINDS[kind].of(s, 8) for s in sites}, jax.random.key(0)
    probes = {path: s.node(0, s.basis(0, False, None, key), key) for path, s in sketched.items()}
    _, lora = jlora.transform(model.loss, LoRA(rank=24)).init(jax.random.key(0), params, x)

    def memory(adapter: Any) -> Any:
        def value(adapter: Any, params: Any, x: jax.Array) -> jax.Array:
            return jlora.wrap(model.loss)(jlora.bind(params, adapter), x)

        return jax.jit(jax.grad(value)).lower(adapter, params, x).compile().memory_analysis()

    step, ours = memory(lora), memory(probes)
    of_w = 4 * d * f
    assert ours.temp_size_in_bytes - step.temp_size_in_bytes < of_w / 5
    assert ours.output_size_in_bytes < of_w


# ------------------------------------------------------------------------------------- the starts


@each_model("fused")
def test_eva(name: str) -> None:
    """A has the leading components, B is zero, the base is the user's own."""
    model, (batch, _), found = once(name, "inputs")
    [lora_rule] = model.rules
    for rule in (lora_rule, DoRA(lora_rule.pattern, rank=1, slots=lora_rule.slots)):
        lora = jlora.transform(model.apply, dataclasses.replace(rule, init=eva(found)))
        base, adapter = lora.init(jax.random.key(0), model.params, batch)
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), base, model.params)
        for path, node in adapter.items():
            np.testing.assert_array_equal(node.a, found.sites[path].inputs[..., :1])
            assert not np.any(node.b)


@each_model("groups")
def test_lora_ga(name: str) -> None:
    """The model begins as it was, and A and B are vectors of the gradient."""
    (model, (batch, _), found), [rule] = once(name, "gradient"), MODELS[name]().rules
    rule = dataclasses.replace(rule, alpha=3.0)
    lora = jlora.transform(model.apply, dataclasses.replace(rule, init=lora_ga(found)))
    base, adapter = lora.init(jax.random.key(0), model.params, batch)
    shapes = jax.eval_shape(lambda: model.params)  # of which there is nothing to subtract from
    form = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert form(lora.init(jax.random.key(0), shapes, batch)) == form((base, adapter))
    apply = jax.jit(lora.apply)
    close(apply(base, adapter, batch), jax.jit(model.apply)(model.params, batch))
    trained = laws.randomize(adapter)
    whole = jlora.arithmetic.difference(trained, adapter)  # that of the parameters
    close(apply(model.params, whole, batch), apply(base, trained, batch), 1e-8)
    for path, node in adapter.items():
        assert np.any(np.asarray(base[path]) != np.asarray(model.params[path]))
        s = found.sites[path]
        u, values, v = as_matrices(s)
        a, b = node.a.reshape(len(u), -1, 1), node.b.reshape(len(u), 1, -1)
        close(a, u[..., :1])
        close(b, v[:, 1:2] * values[:, 1:2, None] * b.shape[-1] ** 0.25 / 4)


BOTH = pytest.mark.parametrize(("start", "kind"), [(eva, "inputs"), (lora_ga, "gradient")])


@slow
def test_lora_ga_of_more_than_there_are() -> None:
    """Singular values that a small W has not are zero."""
    params, rule, batches = LINEAR
    params = {"w": np.diag([4.0, 3, 2, 1])}
    rule = dataclasses.replace(rule, rank=3)
    found = jlora.sketch(linear_loss, params, rule, batches, kind="gradient")
    lora = jlora.transform(linear_loss, dataclasses.replace(rule, init=lora_ga(found)))
    base, adapter = lora.init(jax.random.key(0), params, batches[0])
    b = 2 / 2**1.5 * np.eye(3, 4, 3)
    close(np.abs(adapter["w"].b), b)
    close(np.abs(adapter["w"].a), np.eye(4, 3))
    close(lora.apply(base, adapter, batches[0]), linear_loss(params, batches[0]))


# ---------------------------------------------------------------------------------------- the table


def test_table_and_tree() -> None:
    *_, found = once("fused", "inputs")
    [*_, line] = str(found).splitlines()
    assert re.fullmatch(r"w +2 +6 +5 +5 +\S+ +\d\d\.\d%", line), line
    again = jax.tree.unflatten(jax.tree.structure(found), jax.tree.leaves(found))
    assert str(again) == str(found)
    assert repr(found) == "Sketch(1 sites, kind='inputs')"
    assert repr(found.sites["w"]).startswith("Spectrum(values=float64[2,5], total=float64[2], ")


# ---------------------------------------------------------------------------------------- refusals

LINEAR = ({"w": np.eye(4)}, LoRA("w", rank=1), [np.eye(4)])


def linear_loss(p: Any, x: jax.Array) -> jax.Array:
    return jnp.sum((x @ p["w"]) ** 2)


def one(**changed: Any) -> Any:
    """A sketch of one linear map, with arguments of its own."""
    params, rules, batches = LINEAR
    given = {"params": params, "rules": rules, "batches": batches, "kind": "inputs", "passes": 2}
    return jlora.sketch(changed.pop("loss", linear_loss), **given | changed)


linear = functools.cache(lambda kind: one(kind=kind))  # that sketch, made once


nothing = lambda p, x: 0 * linear_loss(p, x)  # noqa: E731
looked_up = lambda p, x: jnp.sum(p["w"][x.astype(int)] ** 2)  # noqa: E731
formed = lambda p, x: jnp.sum(jnp.sin(p["w"]))  # noqa: E731
FORMING = LoRA("w", rank=1, materialize=True)
REFUSED: dict[type[Exception], dict[str, Any]] = {
    ValueError: {
        "`kind` ... got 'weights'": {"kind": "weights"},
        "`components` ... got 0": {"components": 0},
        "`passes` ... got 1": {"passes": 1},
        "`batches` ... is empty": {"batches": []},
        "`rules` ... must have a jlora.LoRA or jlora.DoRA that": {"rules": Full("w")},
        "the sketch of the inputs of 'w' is not finite": {"batches": [np.nan * np.eye(4)]},
        "nothing to sketch: the inputs of every site are all": {"batches": [np.ones((4, 4))]},
        "the loss depends on none": {"loss": nothing},
        "nothing to sketch: the gradient of every site is": {"loss": nothing, "kind": "gradient"},
        "'w' has no inputs: row numbers are looked up": {"loss": looked_up},
        "'w' has no inputs: W + ΔW is formed there": {"loss": formed, "rules": FORMING},
    },
    TypeError: {
        "iterator, which ends after one. Give list": {"batches": iter([np.eye(4)])},
        "`apply_fn` ... of type int": {"loss": 3},
        "return a scalar; got float64[4,4]": {"loss": lambda p, x: x @ p["w"]},
    },
}


test_refused = all_refused(REFUSED, lambda call: one(**call))


def test_what_is_multiplied_with_another_weight_has_no_inputs() -> None:
    params = {"w": np.eye(4), "v": np.eye(4)}
    loss = lambda p, x: jnp.sum((x @ (p["w"] @ p["v"])) ** 2)  # noqa: E731
    rule = LoRA("w|v", rank=1)
    with refused(NotImplementedError, "dot_general", "'w'", "other than an activation"):
        jlora.sketch(loss, params, rule, [np.eye(4)], kind="inputs")
    jlora.sketch(loss, params, rule, [np.eye(4)], kind="gradient", passes=2)


@BOTH
def test_starts_refuse(start: Any, kind: str) -> None:
    other = {"inputs": "gradient", "gradient": "inputs"}[kind]
    found = linear(kind)
    with pytest.raises(ValueError, match=f"must be of kind {kind!r}; got one of kind {other!r}"):
        start(linear(other))
    with pytest.raises(TypeError, match=rf"`sketch` of {start.__name__} must be one from .*a dict"):
        start({})

    def init(params: Any, rule: LoRA) -> Any:
        rule = dataclasses.replace(rule, init=start(found))
        lora = jlora.transform(lambda p, x: x @ next(iter(p.values())), rule)
        return lora.init(jax.random.key(0), params, np.eye(4))

    with refused(ValueError, "sketch", "must have 'v'", "got no such site"):
        init({"v": np.eye(4)}, LoRA("v", rank=1))
    with refused(ValueError, "", "must have 'w' with the shape (4, 5)", "got (4, 4)"):
        init({"w": np.eye(4, 5)}, LoRA("w", rank=1))
    needed = 3 if kind == "inputs" else 4  # all there are
    with pytest.raises(ValueError, match=f"2 components of 'w'; rank 3 needs {needed}. Sketch"):
        init({"w": np.eye(4)}, LoRA("w", rank=3))


@BOTH
def test_starts_are_pickled_with_their_sketch(start: Any, kind: str) -> None:
    """A rule, as a sweep sends it to its workers, starts A and B as it did."""
    params, _, [x] = LINEAR
    rule = LoRA("w", rank=1, init=start(linear(kind)))
    again = pickle.loads(pickle.dumps(rule))
    assert repr(again) == repr(rule)
    assert f"{start.__name__}(sketch=Sketch(1 sites, kind={kind!r})" in repr(rule)

    def init(rule: LoRA) -> Any:
        lora = jlora.transform(lambda p, x: x @ p["w"], rule)
        return lora.init(jax.random.key(0), params, x)

    first = jax.device_get(init(again))
    for x in jax.tree.leaves(init(rule)[1]):
        x.delete()  # as a training step does that donates the adapter
    chex.assert_trees_all_equal(first, init(rule))
    assert rule == LoRA("w", rank=1, init=start(rule.init.sketch))  # of the same sketch


def test_a_site_that_the_loss_does_not_see() -> None:
    """It has no start, and the last rank."""
    params, rule = {"w": np.eye(4), "v": np.eye(4)}, LoRA("w|v", rank=1)
    model = lambda p, x: (x @ p["w"], x @ p["v"])  # noqa: E731
    loss = lambda p, x: jnp.sum((x @ p["w"]) ** 2) + 0 * jnp.sum(x @ p["v"])  # noqa: E731
    for kind, start in (("inputs", eva), ("gradient", lora_ga)):
        found = jlora.sketch(loss, params, rule, [np.eye(4)], kind=kind, passes=2)
        assert str(found).splitlines()[2].endswith("0   0.0%")
        assert jlora.allocate(found, rule, budget=8) == (LoRA("^w$", rank=1),)
        lora = jlora.transform(model, dataclasses.replace(rule, init=start(found)))
        with refused(ValueError, "sketch", "is zero at 'v', because the loss did not"):
            lora.init(jax.random.key(0), params, np.eye(4))


def test_lora_ga_refuses_what_is_quantized() -> None:
    found = linear("gradient")
    rule = LoRA("w", rank=1, init=lora_ga(found))
    base = jlora.quantize(LINEAR[0], jlora.Int8("w"))
    lora = jlora.transform(lambda p, x: x @ p["w"], rule)
    with refused(ValueError, "", "cannot change W at 'w', which is quantized. Call init"):
        lora.init(jax.random.key(0), base, np.eye(4))
    for gamma in (0, float("inf"), "16"):
        with refused(ValueError, "gamma", "must be a positive finite number", f"got {gamma!r}"):
            lora_ga(found, gamma=gamma)
