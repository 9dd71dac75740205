"""Starts that take a part of W into A and B, or freeze A: the laws, and each one's own formula."""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import laws
import nodes
import numpy as np
import pytest
from cases import CASES, Case
from jax.sharding import PartitionSpec as P
from messages import all_refused, each_refusal, refused
from own_schemes import Pairs
from safetensors.numpy import save_file
from small import KEY, array, as_jax, dense, every, some

import jlora
from jlora import DoRA, LoRA, Slots, analysis, arithmetic, checkpoint, initializers, many, peft
from jlora.initializers import loftq, milora, miss, olora, paca, pissa, pissa_niter

CHANGING = {"pissa": pissa, "pissa_niter": pissa_niter(3), "milora": milora, "olora": olora}
QUANTIZING = {"loftq": loftq(Pairs(), iterations=2)}
FREEZING = {"miss": miss, "paca": paca}
STARTS = {**CHANGING, **QUANTIZING, **FREEZING}
slow = pytest.mark.slow


def table() -> Iterable[Any]:
    """PiSSA on every case, the others on some of each."""
    cases = [c for c in CASES if c.subject != "model" and c.sites]
    for (i, case), (k, name) in itertools.product(enumerate(cases), enumerate(STARTS)):
        daily = case.name == "used_twice" and name == "loftq"
        if daily or k in (0, i % len(STARTS)):
            yield pytest.param(case, name, id=f"{name}-{case.name}", marks=[] if daily else [slow])


@pytest.mark.parametrize(("case", "name"), [*table()])
def test_laws(case: Case, name: str) -> None:
    """Those of LoRA; at the start the model as it was, but for what LoftQ's codes lose."""
    start = functools.partial(dataclasses.replace, init=STARTS[name])
    rules = tuple(start(r) if isinstance(r, LoRA) else r for r in case.rules)
    # What unpacks codes outlives its trace, in JAX's caches of derivatives.
    leaks = case.leaks or name == "loftq"
    case = dataclasses.replace(case, rules=rules, exact_at_zero=False, leaks=leaks)
    with laws.precision(case, jnp.float32) as tolerance:
        # W is the sum of a rest and a product that may be larger; statistics of batches amplify it.
        tolerance = tolerance if name in FREEZING else max(tolerance, 5e-5)
        laws.hold(laws.make(case, jnp.float32), tolerance, name != "loftq")


# ------------------------------------------------------------------------------------- the formulas


def layers(p: Any, x: jax.Array) -> jax.Array:
    """A stack of matrices of their own."""
    return jnp.einsum("sbi,sio->sbo", x, p["w"])


def convolution(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, p["w"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )


def einsum(spec: str) -> Any:
    return lambda p, x: jnp.einsum(spec, x, p["w"])


# Model, W, x and slots.
FORMS: dict[str, Any] = {
    "dense": (dense, (12, 10), (2, 12), None),
    "stack": (layers, (3, 7, 5), (3, 2, 7), None),
    "experts": (einsum("lebi,leio->lebo"), (2, 3, 6, 5), (2, 3, 2, 6), None),
    "last": (einsum("sbi,ios->sbo"), (8, 6, 3), (3, 2, 8), None),
    "convolution": (convolution, (3, 4, 10), (2, 7, 4), None),
    "slots": (dense, (8, 18), (2, 8), Slots(3, (0, 2))),
    "stack of slots": (layers, (2, 8, 18), (2, 2, 8), Slots(3, (2,))),
}
RANK, ALPHA = 3, 5.0


@functools.cache
def made(form: str, init: Any, kind: Any = jnp.float32, rule: Any = LoRA, **options: Any) -> Any:
    """Transform, parameters, base, adapter and x of one of `FORMS`."""
    apply, shape, of_x, slots = FORMS[form]
    rule = rule("w", rank=RANK, alpha=ALPHA, slots=slots, init=init, **options)
    lora, params = jlora.transform(apply, rule), {"w": as_jax(array(*shape), kind)}
    x = as_jax(array(*of_x), kind)
    return lora, params, *lora.init(KEY, params, x), x


def matrices(w: Any, node: Any) -> np.ndarray:
    """Those of W (inputs, outputs) that are factored."""
    each = nodes.matrices(w, node.layout)
    return each.reshape(-1, *each.shape[-2:])


def singular(kept: slice) -> Any:
    def part(w: np.ndarray) -> np.ndarray:
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        return (u[:, kept] * s[kept]) @ vt[kept]

    return part


def first(w: np.ndarray) -> np.ndarray:
    """s·QR with s as PEFT has it."""
    q, r = np.linalg.qr(w.T)
    return ALPHA / RANK * (q[:, :RANK] @ r[:RANK]).T


OF_JAX = {  # with the standard deviation for so many inputs
    "normal": (jax.nn.initializers.normal(0.02), lambda n: 0.02),
    "lecun": (jax.nn.initializers.lecun_normal(), lambda n: n**-0.5),
    "orthogonal": (jax.nn.initializers.orthogonal(), lambda n: n**-0.5),
    "constant": (jax.nn.initializers.constant(0.5), lambda n: 0.0),
}


@pytest.mark.parametrize(
    ("name", "form"), every(OF_JAX, FORMS, daily={("lecun", "stack of slots"), ("normal", "last")})
)
def test_initializers_of_jax_draw_each_matrix_of_a(name: str, form: str) -> None:
    """B is zero; a variance is that of the inputs of one matrix, however many are stacked."""
    init, deviation = OF_JAX[name]
    node = made(form, init)[3]["w"]
    count, inputs, _ = matrices(np.zeros(FORMS[form][1]), node).shape
    a = np.asarray(node.a).reshape(count, inputs, RANK)
    assert not np.any(node.b)
    expected = deviation(inputs)
    assert abs(a.std() / expected - 1) < 4 / a.size**0.5 if expected else np.all(a == 0.5)
    if name != "constant":
        assert len(np.unique(a)) == a.size
    if name == "orthogonal":
        np.testing.assert_allclose(
            a.mT @ a, np.broadcast_to(np.eye(RANK), (count, 3, 3)), atol=1e-5
        )


PARTS = {"pissa": singular(slice(RANK)), "milora": singular(slice(-RANK, None)), "olora": first}
DAILY_PARTS = {("milora", "convolution")}


@pytest.mark.parametrize(("name", "form"), every(PARTS, FORMS, daily=DAILY_PARTS))
def test_the_part_of_each_matrix(name: str, form: str) -> None:
    """In float64: what is taken is the formula's, what is left the rest; other slots stay."""
    with jax.enable_x64(True):
        lora, params, base, adapter, x = made(form, CHANGING[name], jnp.float64)
        w, rest = (np.asarray(t["w"]) for t in (params, base))
        whole, left = (matrices(x, adapter["w"]) for x in (w, rest))
        np.testing.assert_allclose(whole - left, [*map(PARTS[name], whole)], atol=1e-12)
        assert np.sum(w != rest) <= whole.size
        np.testing.assert_allclose(jlora.merge(base, adapter)["w"], w, atol=1e-12)
        np.testing.assert_allclose(lora.apply(base, adapter, x), FORMS[form][0](params, x), 1e-12)
        assert {x.dtype for x in (base["w"], adapter["w"].a, adapter["w"].b)} == {np.dtype("f8")}


def test_a_and_b_share_each_value() -> None:
    """A root each, so that both have gradients of one size."""
    _, params, _, adapter, _ = made("dense", pissa)
    a, b = map(np.asarray, adapter["w"][:2])
    values = np.linalg.svd(params["w"], compute_uv=False)[:RANK] / (ALPHA / RANK)
    for product in (a.T @ a, b @ b.T):
        np.testing.assert_allclose(np.diag(product), values, rtol=1e-5)


@slow
def test_iterations_come_near_where_values_decay() -> None:
    """On a matrix of 200 × 120 whose values are 1/k: what is left is the least but for 0.1%."""
    u, v = (np.linalg.qr(array(n, 120))[0] for n in (200, 120))
    w, x = jnp.asarray((u / np.arange(1, 121)) @ v.T, jnp.float32), array(1, 200)

    def rest(init: Any) -> float:
        lora = jlora.transform(dense, LoRA("w", rank=8, init=init))
        return float(np.linalg.norm(lora.init(KEY, {"w": w}, x)[0]["w"]))

    least = rest(pissa)
    assert 1.001 * least < rest(pissa_niter(0))
    assert 0.999 * least < rest(pissa_niter(3)) < 1.001 * least


@pytest.mark.parametrize("name", some(CHANGING, "olora"))
def test_fewer_bits(name: str) -> None:
    """W is rounded once, to the rest; A and B are rounded before they are taken from W."""
    _, params, base, adapter, _ = made("dense", CHANGING[name], jnp.bfloat16)
    node = adapter["w"]
    assert (base["w"].dtype, node.a.dtype, node.b.dtype) == (jnp.bfloat16, *[jnp.float32] * 2)
    w, rest, a, b = (np.asarray(x, np.float64) for x in (params["w"], base["w"], *node[:2]))
    np.testing.assert_allclose(rest, w - node.scale * a @ b, rtol=2**-8, atol=1e-5)
    _, params, base, adapter, _ = made("dense", CHANGING[name], dtype=jnp.bfloat16)
    assert adapter["w"].a.dtype == jnp.bfloat16
    np.testing.assert_allclose(jlora.merge(base, adapter)["w"], params["w"], atol=1e-6)


def test_dora_starts_as_the_model() -> None:
    """Its norms are those of the rest and A·B, which is W."""
    dora, params, base, adapter, x = made("dense", pissa, rule=DoRA)
    np.testing.assert_allclose(adapter["w"].m, np.linalg.norm(params["w"], axis=0), rtol=1e-5)
    np.testing.assert_allclose(dora.apply(base, adapter, x), dense(params, x), atol=1e-5)


# ------------------------------------------------------------------------------- how init is called


# How `init` may be called. What a traced function closes over has values, operations on it none.
WAYS = {
    "numpy": lambda init, params, x: init(KEY, jax.tree.map(np.asarray, params), x),
    "jit": lambda init, *args: jax.jit(init)(KEY, *args),
    "jit closed over": lambda init, *args: jax.jit(lambda key: init(key, *args))(KEY),
    "eval_shape": lambda init, *args: jax.eval_shape(init, KEY, *args),
    "eval_shape closed over": lambda init, *args: jax.eval_shape(lambda k: init(k, *args), KEY),
    "vmap": lambda init, *args: jax.tree.map(
        lambda x: x[0], jax.vmap(lambda key: init(key, *args))(KEY[None])
    ),
}


def start_of(kind: str) -> tuple[Any, Any, Any]:
    """The function `init`, parameters and x of each start, and of other methods and tables."""
    if kind in STARTS:
        init = loftq(jlora.Int8()) if kind == "loftq" else STARTS[kind]
        lora, params, *_, x = made("stack", init)
        return lora.init, params, x
    params, x = {"w": array(64, 32)}, array(2, 64)
    if kind == "Rows":
        lora = jlora.transform(lambda p, ids: p["w"][ids], jlora.Rows("w", [3, 5]))
        return lora.init, params, jnp.array([3])
    lora = jlora.transform(dense, (DoRA if kind == "DoRA" else LoRA)("w", rank=2, init=pissa))
    if kind == "many":
        return lambda key, *args: many.init(lora, key[None], *args, ranks=[2]), params, x
    return lora.init, jlora.quantize(params, jlora.Int8("w")) if kind == "codes" else params, x


KINDS = (*STARTS, "DoRA", "Rows", "codes", "many")
DAILY_WAYS = {
    *[("pissa", "jit closed over"), ("Rows", "jit")],
    *[("DoRA", "eval_shape closed over"), ("many", "numpy")],
}


@pytest.mark.parametrize(("kind", "way"), every(KINDS, WAYS, daily=DAILY_WAYS))
def test_however_init_is_called(kind: str, way: str) -> None:
    """The base and the adapter have the same forms, and are together the same parameters."""
    init, params, x = start_of(kind)
    found, expected = WAYS[way](init, params, x), init(KEY, params, x)
    form = functools.partial(jax.tree.map, lambda x: (x.shape, str(x.dtype)))
    assert form(found) == form(expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    if kind in (*STARTS, "DoRA"):  # marked as for a base that is not the parameters
        assert found[1]["w"].residual == (kind not in FREEZING)
    if "eval_shape" not in way:
        merged = [
            jlora.merge(base, many.take(x, 0) if kind == "many" else x)["w"]
            for base, x in (found, expected)
        ]
        np.testing.assert_allclose(*merged, atol=0.05 if kind in ("loftq", "codes") else 1e-5)


def test_what_is_closed_over_must_be_finite() -> None:
    lora, params, _, _, x = made("dense", pissa)
    bad = np.where(np.eye(*params["w"].shape) * np.eye(1, 10), np.inf, params["w"])
    for way in ("jit closed over", "eval_shape closed over", "vmap"):
        with refused(ValueError, "", "has 1 values that are NaN or infinite at 'w'"):
            WAYS[way](lora.init, {"w": jnp.asarray(bad)}, x)


def init_of(init: Any, params: Any) -> Any:
    return jlora.transform(dense, LoRA("w", rank=2, init=init)).init(KEY, params, array(1, 64))


REFUSED: dict[type[Exception], dict[str, Any]] = {
    TypeError: {
        "`scheme` ... loftq ... such as jlora.NF4()": lambda: loftq("nf4"),  # pyright: ignore
    },
    ValueError: {
        "`params` ... arrays, or call init under jax.eval_shape.": lambda: init_of(
            pissa, {"w": jax.ShapeDtypeStruct((64, 32), jnp.float32)}
        ),
        "`params` ... `init` of LoRA('w'), quantizes it itself": lambda: init_of(
            loftq(jlora.NF4()), jlora.quantize({"w": array(64, 32)}, jlora.NF4("w"))
        ),
        "`iterations` ... pissa_niter ... at least 0": lambda: pissa_niter(-1),
        "`iterations` ... loftq ... at least 1": lambda: loftq(jlora.NF4(), 0),
        "`scheme` ... must have no pattern, ... got 'w'": lambda: loftq(jlora.NF4("w")),
        "loftq cannot quantize 'w'. `block` of MXFP4": lambda: made("dense", loftq(jlora.MXFP4())),
        "`frozen` ... DoRA('w') must be (), as DoRA": lambda: DoRA("w", init=miss),
        "`frozen` ... or ('b',); got ('m',).": lambda: LoRA("w", frozen=("m",)),
        "`frozen` ... LoRA('w') must be (), ('a',) or": lambda: LoRA("w", frozen="a b"),
        "`frozen` ... (`init` freezes ('a',)); got ('b',)": lambda: LoRA(
            "w", frozen=("b",), init=miss
        ),
    },
}


test_refused = all_refused(REFUSED)


# ----------------------------------------------------------------------------- a base in fewer bits


def error(base: Any, adapter: Any, w: Any) -> float:
    """‖W - Q - s·A·B‖ / ‖W‖."""
    return float(np.linalg.norm(jlora.merge(base, adapter)["w"] - w) / np.linalg.norm(w))


SCHEMES = {"NF4": jlora.NF4("w"), "Int8": jlora.Int8("w"), "Int4": jlora.Int4("w", group=32)}


@pytest.mark.parametrize(("name", "kind"), every(CHANGING, SCHEMES, daily={("pissa", "NF4")}))
def test_what_is_quantized_stays_so(name: str, kind: str) -> None:
    """A stack: the same leaf but for its values, each matrix as if it were alone."""
    lora = jlora.transform(layers, LoRA("w", rank=RANK, alpha=RANK, init=CHANGING[name]))
    params, x = {"w": array(3, 64, 32)}, array(3, 1, 64)
    packed = jlora.quantize(params, SCHEMES[kind])
    base, adapter = lora.init(KEY, packed, x)
    assert jax.tree.structure(base) == jax.tree.structure(packed)
    plain = jlora.dequantize(packed)
    rest, expected = lora.init(KEY, plain, x)
    if name != "pissa_niter":  # whose draws are others
        laws.assert_close(
            *(jlora.merge({"w": 0 * params["w"]}, t) for t in (adapter, expected)), 1e-4
        )
        again = jlora.quantize(rest, SCHEMES[kind])
        laws.assert_close(jlora.dequantize(base), jlora.dequantize(again), 2e-2)
    assert error(base, adapter, plain["w"]) < 1.2 * float(jnp.max(packed["w"].error))
    laws.assert_same_codes(jax.jit(lora.init)(KEY, packed, x)[0]["w"].data, base["w"].data)


@pytest.mark.parametrize("form", some(FORMS, "stack of slots"))
def test_loftq_cuts_as_quantize_does(form: str) -> None:
    """Of each kind of site, with the slots that are not adapted quantized too."""
    lora, params, base, adapter, x = made(form, QUANTIZING["loftq"])
    expected = jlora.quantize(params, Pairs("w"), sites=lora.sites(params, x))["w"]
    assert base["w"].form == expected.form
    assert jax.tree.structure(base["w"]) == jax.tree.structure(expected)
    assert error(base, adapter, params["w"]) < error({"w": expected}, {}, params["w"])
    assert base["w"].dtype == params["w"].dtype


# ---------------------------------------------------------------------------------- trees and files


@pytest.mark.parametrize("name", some((*CHANGING, "loftq"), "loftq"))
def test_resuming_needs_the_base_of_the_start(name: str, tmp_path: Any) -> None:
    """Made again by `init` with the same key; the parameters themselves are refused."""
    init = {**CHANGING, "loftq": loftq(jlora.Int8())}[name]
    lora, params, base, adapter, x = made("dense", init)
    rules, trained = lora.rules, laws.randomize(adapter)
    prints = checkpoint.fingerprint(base, values=True)
    checkpoint.save(tmp_path / name, trained, rules, base=prints)
    assert checkpoint.read(tmp_path / name).rules == rules
    again, _ = jlora.transform(dense, *checkpoint.read(tmp_path / name).rules).init(KEY, params, x)
    restored = checkpoint.restore(tmp_path / name, base=again)
    laws.assert_close(lora.apply(again, restored, x), lora.apply(base, trained, x), 0.0)
    differs = "expected scheme Int8(block=None)" if name == "loftq" else "expected hash"
    with refused(ValueError, "base", "w", differs):
        checkpoint.restore(tmp_path / name, base=params)


def test_an_initializer_of_a_scheme_of_ones_own_is_foreign(tmp_path: Any) -> None:
    lora, _, _, adapter, _ = made("dense", loftq(Pairs()))
    checkpoint.save(tmp_path / "a", adapter, lora.rules)
    [rule] = checkpoint.read(tmp_path / "a").rules
    with refused(NotImplementedError, "init", "was jlora.initializers.loftq"):
        rule.init()


# ------------------------------------------------------------------------------------ MiSS and PaCA


def changes(form: str, init: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """ΔW of each matrix of a weight, and its B, drawn anew; the base is that of the parameters."""
    _, params, base, adapter, _ = made(form, init)
    assert base["w"] is params["w"]
    node = adapter["w"]
    b = array(*node.b.shape)
    delta = jlora.merge({"w": jnp.zeros_like(params["w"])}, {"w": node._replace(b=b)})["w"]
    each = matrices(delta, node)
    return list(zip(each, np.asarray(b).reshape(len(each), RANK, -1), strict=True))


@pytest.mark.parametrize("form", some(FORMS, "slots"))
def test_miss_repeats_rows(form: str) -> None:
    """ΔW[i, o] = s·B[i mod r, o]; where r does not divide the inputs too."""
    for matrix, block in changes(form, miss):
        i = np.arange(len(matrix)) % RANK
        np.testing.assert_allclose(matrix, ALPHA / RANK * block[i], rtol=1e-6)


@pytest.mark.parametrize("form", some(FORMS, "slots"))
def test_paca_trains_some_rows(form: str) -> None:
    """ΔW is s·B in r different rows of each matrix, and 0 in the others; each key picks its own."""
    each, picked = changes(form, paca), []
    for matrix, block in each:
        rows = [np.flatnonzero(np.isclose(matrix, ALPHA / RANK * x).all(1)) for x in block]
        picked.append(np.ravel(rows).tolist())
        assert len({*picked[-1]}) == RANK
        assert not np.delete(matrix, picked[-1], 0).any()
    assert len(each) == 1 or len({*map(tuple, picked)}) > 1
    lora, params, *_, x = made(form, paca)
    found = [lora.init(jax.random.key(i), params, x)[1]["w"].a for i in range(20)]
    chosen = np.sum(found, axis=0).reshape(len(each), -1, RANK).sum((0, 2))
    assert chosen.all()  # every input is picked by some key


def swapped(key: Any, w: Any, site: Any, rule: Any) -> Any:
    """B at chance and fixed, A zero and trained: MiCA's form."""
    _, a, b = initializers.gaussian(key, w, site, rule)
    return w, 0 * a, jax.random.normal(key, b.shape)


@pytest.mark.parametrize(
    ("init", "frozen", "trained"), [(miss, (), "b"), (swapped, ("b",), "a")], ids=["miss", "rule"]
)
def test_a_frozen_factor(init: Any, frozen: Any, trained: str, tmp_path: Any) -> None:
    """Labels, counts, gradients, partitions and checkpoints; by the start or by the rule."""
    assert dataclasses.replace(LoRA("w", init=miss), init=None).all_frozen == ()
    lora, params, base, adapter, x = made("stack", init, frozen=frozen)
    node, other = adapter["w"], "ab".replace(trained, "")
    assert lora.sites(params, x).trainable == jlora.count(adapter) == getattr(node, trained).size
    labels = jlora.labels(adapter)["w"]
    assert {"a": labels.a, "b": labels.b} == {trained: trained, other: "base"}
    assert f"frozen=('{other}',)" in repr(node)
    grads = jax.grad(lambda a: jnp.sin(lora.apply(base, a, x)).sum())(adapter)["w"]
    assert np.any(getattr(grads, trained)) and not np.any(getattr(grads, other))
    found = jlora.sharding.specs({"w": P("s", "i", "o")}, adapter)["w"]
    assert (found.a, found.b) == (P("s", "i", None), P("s", None, "o"))
    if init is miss:
        checkpoint.save(tmp_path / "a", adapter, lora.rules, base=base)
        restored = checkpoint.restore(tmp_path / "a", like=adapter, base=base)
        assert jax.tree.structure(restored) == jax.tree.structure(adapter)
        assert checkpoint.read(tmp_path / "a").rules[0].init is miss
        with refused(ValueError, "", "w", "expected frozen ('a',), got ()"):
            checkpoint.restore(tmp_path / "a", like={"w": node._replace(frozen=())})


def test_miss_among_adapters() -> None:
    """A sum of such is one, what is factored anew is none; tables take it with others."""
    lora, _, base, adapter, x = made("dense", miss)
    node = adapter["w"]
    one, other = {"w": node._replace(b=array(*node.b.shape))}, made("dense", None)[3]
    assert arithmetic.add([one, one])["w"].frozen == ("a",)
    assert arithmetic.add([one, other])["w"].frozen == ()
    assert arithmetic.truncate(arithmetic.add([one, one]), 2)["w"].frozen == ()
    table = many.stack([one, one])
    assert table["w"].frozen == ("a",)
    for call in (
        lambda: many.stack([one, other]),
        lambda: many.insert(table, 0, other),
        lambda: many.insert(many.stack([other]), 0, one),
    ):
        with refused(ValueError, "adapters", "w", "has different trainable factors"):
            call()
    assert many.stack([{"w": one["w"]._replace(frozen=())}, other])["w"].frozen == ()

    def routed(table: Any) -> Any:
        y = many.route(lora.apply)(base, table, jnp.array([0, -1]), x)
        return y.sum(), y

    grads, y = jax.jit(jax.grad(routed, has_aux=True))(table)
    laws.assert_close(y[0], lora.apply(base, one, x)[0], 1e-5)
    assert np.any(grads["w"].b) and not np.any(grads["w"].a)


@pytest.mark.parametrize("name", some(STARTS, "pissa_niter"))
def test_equal_starts_share_a_program(name: str, caplog: Any) -> None:
    """A sweep makes its rules anew for each run."""
    apply, shape, of_x, _ = FORMS["dense"]
    params, x = {"w": as_jax(array(*shape))}, as_jax(array(*of_x))
    jax.clear_caches()
    with jax.log_compiles():
        for is_compiled in (True, False):
            caplog.clear()
            rule = LoRA("w", rank=RANK, init=copy.deepcopy(STARTS[name]))
            jlora.transform(apply, rule).init(KEY, params, x)
            assert any("Compiling" in r.getMessage() for r in caplog.records) == is_compiled


# ---------------------------------------------------------------------------------- a changed base


def test_a_changed_base_is_not_mistaken(tmp_path: Any) -> None:
    """For the parameters: in PEFT's files, merged exports, sums, tables and checkpoints."""
    lora, params, _, initial, x = made("dense", pissa)
    adapter, other = {"w": initial["w"]._replace(b=initial["w"].b + 1)}, made("dense", None)[3]
    names = [peft.Name("w", "model.w", "io")]
    (tmp_path / "model").mkdir()
    save_file({"model.w.weight": np.zeros((10, 12), "f")}, tmp_path / "model/model.safetensors")
    merged = (tmp_path / "model", adapter, tmp_path / "merged")
    for write in (
        lambda: peft.save(tmp_path / "adapter", params, adapter, names),
        lambda: peft.tensors(params, adapter, names),
        lambda: peft.export_merged(*merged, names=names),
    ):
        with refused(ValueError, "adapter", "w", "mark the nodes: node.replace(residual=False)."):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    whole = arithmetic.difference(adapter, initial)
    peft.save(tmp_path / "adapter", params, whole, names)
    loaded = peft.load(tmp_path / "adapter", params, names)
    expected = lora.apply(lora.init(KEY, params, x)[0], adapter, x)
    np.testing.assert_allclose(lora.apply(params, loaded, x), expected, atol=1e-5)
    own = {"w": adapter["w"]._replace(residual=False)}
    assert jax.tree.structure(own) != jax.tree.structure(adapter)
    peft.tensors(params, own, names)

    for combine in (
        arithmetic.add,
        many.stack,
        lambda pair: arithmetic.difference(*pair),
        lambda pair: many.insert(many.stack(pair[:1]), 0, pair[1]),
    ):
        with refused(ValueError, "", "w", "belongs to the original parameters in one"):
            combine([adapter, other])
    with refused(ValueError, "node", "and `other` must belong to one base, but only"):
        analysis.distance(initial["w"], other["w"])
    assert float(analysis.distance(initial["w"], initial["w"])) < 1e-4
    assert many.init(lora, jax.random.split(KEY, 2), params, x)[1]["w"].residual

    checkpoint.save(tmp_path / "checkpoint", adapter, lora.rules)
    assert checkpoint.restore(tmp_path / "checkpoint")["w"].residual
    with refused(ValueError, "", "w", "expected residual True, got False"):
        checkpoint.restore(tmp_path / "checkpoint", like=other)


# Of adapters of a reduced base: what is made of two, the same of their weights (of the parameters,
# of which W is given too), and whether it is for the reduced base again.
WEIGHED: dict[str, Any] = {
    "mean": (lambda t: arithmetic.add(t, [0.25, 0.75]), lambda x, y, _: x / 4 + 3 * y / 4, True),
    "beyond": (lambda t: arithmetic.add(t, jnp.array([-1, 2])), lambda x, y, _: 2 * y - x, True),
    "difference": (lambda t: arithmetic.difference(*t), lambda x, y, w: w + x - y, False),
    "zero": (lambda t: arithmetic.add(t, [2, -2]), lambda x, y, w: w + 2 * (x - y), False),
    "truncate": (lambda t: arithmetic.truncate(t[0], RANK), lambda x, y, _: x, True),
    "insert": (
        lambda t: many.take(many.insert(many.stack([t[0]] * 2), 1, t[1]), 1),
        lambda x, y, _: y,
        True,
    ),
}


@pytest.mark.parametrize("start", some([*CHANGING, "loftq"], "pissa"))
def test_what_is_made_of_adapters_of_a_changed_base(start: str) -> None:
    """Sums of models whose weights add up to 1; a difference, by which the base cancels."""
    _, params, base, initial, _ = made("dense", STARTS[start])
    pair = [{"w": initial["w"]._replace(b=initial["w"].b + i)} for i in (1.0, -0.5)]
    weights = [jlora.merge(base, x)["w"] for x in pair]
    for make, expected, residual in WEIGHED.values():
        found = make(pair)
        assert found["w"].residual == residual
        actual = jlora.merge(base if residual else params, found)["w"]
        laws.assert_close(actual, expected(*weights, params["w"]), 1e-5)


X = jnp.ones((12, 10))
UNSAID: dict[str, Any] = {
    "`adapters` ... add up to 1 or to 0; got 2": lambda t: arithmetic.add([t, t]),
    "`adapter` ... add up to 1 or to 0; got 0.5": lambda t: arithmetic.scale(t, 0.5),
    "`adapter` ... got traced ones": lambda t: jax.jit(arithmetic.scale)(t, 0.5),
    "`other` ... but one adapter lacks the site": lambda t: arithmetic.difference({}, t),
    "`adapters` ... so ΔW = 0 is not the original model": lambda t: arithmetic.ties([t, t]),
    "`adapters` ... is not the original model": lambda t: arithmetic.dare([t, t], key=KEY),
    "`adapters` ... so a slot without it would not": lambda t: many.stack([t], size=2),
    "`adapters` ... so a slot": lambda t: many.stack([t, {}]),
    "`adapters` ... a slot without it": lambda t: many.remove(many.stack([t, t]), 0),
    "`adapters` ... would not be the model": lambda t: many.insert(
        many.stack([t, t]), jnp.array(0), {}
    ),
    "`table` ... so -1 would not be the model": lambda t: many.prepare(many.stack([t])),
    "`table` ... so -1 would not be": lambda t: many.route(jlora.merge)(
        {"w": X}, many.stack([t]), [0]
    ),
}


@each_refusal({ValueError: UNSAID})
def test_a_changed_base_without_its_adapter_is_not_the_model(
    error: Any, call: Any, facts: Any
) -> None:
    argument, *rest = facts
    adapter = made("dense", pissa)[3]
    with refused(error, argument, "w", *rest, "Give jlora.arithmetic.difference(adapter, initial)"):
        call(adapter)
