"""Starts that take a part of W into A and B, or freeze A: the laws, and each one's own formula."""

import dataclasses
import functools
import itertools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from cases import CASES, SUBJECTS, Case
from jax.sharding import PartitionSpec as P
from own_schemes import Pairs
from safetensors.numpy import save_file
from small import KEY, array, exactly

import jlora
from jlora import LoRA, Slots, analysis, arithmetic, checkpoint, initializers, many, peft
from jlora.checkpoint._meta import digest
from jlora.initializers import loftq, milora, miss, olora, pissa, pissa_niter

CHANGING = {"pissa": pissa, "pissa_niter": pissa_niter(3), "milora": milora, "olora": olora}
STARTS = {**CHANGING, "miss": miss, "loftq": loftq(Pairs(), iterations=2)}


def started(case: Case, init: Any) -> Case:
    """A case whose rules of LoRA start so."""
    rules = (dataclasses.replace(r, init=init) if isinstance(r, LoRA) else r for r in case.rules)
    return dataclasses.replace(case, rules=tuple(rules), exact_at_zero=False)


def every(daily: set[Any], *axes: Any) -> list[Any]:
    """All combinations, those that are not `daily` marked slow."""
    rows = itertools.product(*axes)
    return [
        pytest.param(
            *row, id="-".join(map(str, row)), marks=[] if row in daily else [pytest.mark.slow]
        )
        for row in rows
    ]


def is_for(case: Case) -> bool:
    """Whether it has sites."""
    return case.sites > 0 and case.subject != "model"


DAILY = {
    ("pissa", "conv_nchw"),
    ("loftq", "used_twice"),
}


def table() -> list[Any]:
    """PiSSA on every case, the others on some of each; each on one every day.

    `transforms_agree` for PiSSA every day, for the others in the long run.
    """
    rows, names = [], list(STARTS)
    for i, subject in enumerate(SUBJECTS):
        cases = [c for c in CASES if c.subject == subject and is_for(c)]
        for j, case in enumerate(cases):
            for k, name in enumerate(names):
                if k and (i + j) % len(names) != k:
                    continue
                daily = (name, case.name) in DAILY
                marks = [] if daily else [pytest.mark.slow]
                every_law = name != "loftq" and (name == "pissa" or not daily)
                rows.append(
                    pytest.param(case, name, every_law, id=f"{name}-{case.name}", marks=marks)
                )
    return rows


@pytest.mark.parametrize(("case", "name", "every_law"), table())
def test_laws(case: Case, name: str, every_law: bool) -> None:
    """Those of LoRA; at the start the model as it was, but for what LoftQ's codes lose."""
    # What unpacks codes outlives its trace, in JAX's caches of derivatives.
    case = dataclasses.replace(started(case, STARTS[name]), leaks=case.leaks or name == "loftq")
    with laws.precision(case, jnp.float32) as tolerance:
        made = laws.make(case, jnp.float32)
        # W is the sum of a rest and a product that may be larger; statistics of batches amplify it.
        tolerance = tolerance if name == "miss" else max(tolerance, 5e-5)
        laws.hold(made, tolerance, every_law)
        if name != "loftq" and not every_law:
            laws.zero_is_the_base(made, tolerance)


# ------------------------------------------------------------------------------------- the formulas


def heads(p: Any, x: jax.Array) -> jax.Array:
    """Two axes of inputs."""
    return jnp.einsum("bhk,hko->bo", x, p["w"])


def layers(p: Any, x: jax.Array) -> jax.Array:
    """A stack of matrices of their own."""
    return jnp.einsum("sbi,sio->sbo", x, p["w"])


def last(p: Any, x: jax.Array) -> jax.Array:
    """A stack along the last axis."""
    return jnp.einsum("sbi,ios->sbo", x, p["w"])


def dense(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"]


def convolution(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, p["w"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )


# Model, W, x, slots, and W as the matrices (inputs, outputs) that are factored.
FORMS: dict[str, Any] = {
    "dense": (dense, (12, 10), (2, 12), None, lambda w: [w]),
    "wide": (dense, (6, 20), (2, 6), None, lambda w: [w]),
    "stack": (layers, (3, 8, 6), (3, 2, 8), None, list),
    "experts": (
        lambda p, x: jnp.einsum("lebi,leio->lebo", x, p["w"]),
        (2, 3, 6, 5),
        (2, 3, 2, 6),
        None,
        lambda w: list(w.reshape(6, 6, 5)),
    ),
    "odd stack": (layers, (3, 7, 5), (3, 2, 7), None, list),
    "last": (last, (8, 6, 3), (3, 2, 8), None, lambda w: list(w.transpose(2, 0, 1))),
    "heads": (heads, (3, 4, 10), (2, 3, 4), None, lambda w: [w.reshape(12, 10)]),
    "convolution": (convolution, (3, 4, 10), (2, 7, 4), None, lambda w: [w.reshape(12, 10)]),
    "slots": (dense, (8, 18), (2, 8), Slots(3, (0, 2)), lambda w: [w[:, :6], w[:, 12:]]),
    "stack of slots": (
        layers,
        (2, 8, 18),
        (2, 2, 8),
        Slots(3, (2,)),
        lambda w: [w[0, :, 12:], w[1, :, 12:]],
    ),
}
RANK, ALPHA = 3, 5.0


@functools.cache
def made(form: str, init: Any, kind: Any = jnp.float32, **options: Any) -> Any:
    """Transform, parameters, base, adapter and x of one of `FORMS`."""
    apply, shape, of_x, slots, _ = FORMS[form]
    rule = LoRA("w", rank=RANK, alpha=ALPHA, slots=slots, init=init, **options)
    lora, params = jlora.transform(apply, rule), {"w": jnp.asarray(array(*shape), kind)}
    x = jnp.asarray(array(*of_x), kind)
    return lora, params, *lora.init(KEY, params, x), x


def largest(w: np.ndarray) -> np.ndarray:
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return (u[:, :RANK] * s[:RANK]) @ vt[:RANK]


def smallest(w: np.ndarray) -> np.ndarray:
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return (u[:, -RANK:] * s[-RANK:]) @ vt[-RANK:]


def first(w: np.ndarray) -> np.ndarray:
    """s·QR with s as PEFT has it."""
    q, r = np.linalg.qr(w.T)
    return ALPHA / RANK * (q[:, :RANK] @ r[:RANK]).T


PARTS = {"pissa": largest, "milora": smallest, "olora": first}


@pytest.mark.parametrize(
    ("name", "form"),
    every(
        {
            ("milora", "convolution"),
            ("olora", "stack"),
        },
        PARTS,
        FORMS,
    ),
)
def test_the_part_of_each_matrix(name: str, form: str) -> None:
    """In float64: what is taken is the formula's, what is left the rest, and float64 stays."""
    with jax.enable_x64(True):
        lora, params, base, adapter, x = made(form, CHANGING[name], jnp.float64)
        matrices = FORMS[form][-1]
        w, rest = (np.asarray(t["w"]) for t in (params, base))
        for whole, left in zip(matrices(w), matrices(rest), strict=True):
            np.testing.assert_allclose(whole - left, PARTS[name](whole), atol=1e-12)
        np.testing.assert_allclose(jlora.merge(base, adapter)["w"], w, atol=1e-12)
        np.testing.assert_allclose(lora.apply(base, adapter, x), FORMS[form][0](params, x), 1e-12)
        assert {x.dtype for x in (base["w"], adapter["w"].a, adapter["w"].b)} == {np.dtype("f8")}


def test_other_slots_stay_to_the_bit() -> None:
    _, params, base, _, _ = made("slots", pissa)
    np.testing.assert_array_equal(base["w"][:, 6:12], params["w"][:, 6:12])
    assert not np.any(np.asarray(base["w"] == params["w"])[:, :6].all(0))


def test_a_and_b_share_each_value() -> None:
    """A root each, so that both have gradients of one size."""
    _, params, _, adapter, _ = made("dense", pissa)
    a, b = adapter["w"].a, adapter["w"].b
    values = np.linalg.svd(params["w"], compute_uv=False)[:RANK] / (ALPHA / RANK)
    np.testing.assert_allclose(np.diag(a.T @ a), values, rtol=1e-5)
    np.testing.assert_allclose(np.diag(b @ b.T), values, rtol=1e-5)


@pytest.mark.slow
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


@pytest.mark.parametrize("name", CHANGING)
def test_bfloat16_is_rounded_once(name: str) -> None:
    """The rest is W - s·A·B to a rounding of its own, and so is the start."""
    _, params, base, adapter, _ = made("dense", CHANGING[name], jnp.bfloat16)
    node = adapter["w"]
    assert base["w"].dtype == jnp.bfloat16
    assert node.a.dtype == node.b.dtype == jnp.float32
    w = np.asarray(params["w"], np.float64)
    exact = w - node.scale * np.asarray(node.a, np.float64) @ np.asarray(node.b, np.float64)
    np.testing.assert_allclose(np.asarray(base["w"], np.float64), exact, rtol=2**-8, atol=1e-5)


def test_factors_of_fewer_bits_are_those_that_are_taken() -> None:
    """A and B are rounded first, so that the start is still W in float32."""
    _, params, base, adapter, _ = made("dense", pissa, dtype=jnp.bfloat16)
    assert adapter["w"].a.dtype == jnp.bfloat16
    np.testing.assert_allclose(jlora.merge(base, adapter)["w"], params["w"], atol=1e-6)


def test_dora_starts_as_the_model() -> None:
    """Its norms are those of the rest and A·B, which is W."""
    params, x = {"w": array(12, 10)}, array(2, 12)
    dora = jlora.transform(dense, jlora.DoRA("w", rank=RANK, init=pissa))
    base, adapter = dora.init(KEY, params, x)
    np.testing.assert_allclose(adapter["w"].m, np.linalg.norm(params["w"], axis=0), rtol=1e-5)
    np.testing.assert_allclose(dora.apply(base, adapter, x), dense(params, x), atol=1e-5)


# ------------------------------------------------------------------------------- how init is called


# How `init` may be called. What a traced function closes over has values, operations on it none.
WAYS = {
    "jit": lambda init, *args: jax.jit(init)(KEY, *args),
    "jit closed over": lambda init, *args: jax.jit(lambda key: init(key, *args))(KEY),
    "eval_shape": lambda init, *args: jax.eval_shape(init, KEY, *args),
    "eval_shape closed over": lambda init, *args: jax.eval_shape(lambda k: init(k, *args), KEY),
    "vmap": lambda init, *args: jax.tree.map(
        lambda x: x[0], jax.vmap(lambda key: init(key, *args))(KEY[None])
    ),
}
STACK_STARTS = {**STARTS, "loftq": loftq(jlora.Int8())}


DAILY_WAYS = {("pissa", "jit closed over"), ("loftq", "eval_shape"), ("miss", "vmap")}


@pytest.mark.parametrize(("name", "way"), every(DAILY_WAYS, STARTS, WAYS))
def test_however_init_is_called(name: str, way: str) -> None:
    """The base and the adapter have the same forms, and are together the parameters."""
    lora, params, base, adapter, x = made("stack", STACK_STARTS[name])
    found = WAYS[way](lora.init, params, x)
    forms = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)  # noqa: E731
    assert forms(found) == forms((base, adapter))
    if "eval_shape" not in way:
        merged = jlora.merge(*found)["w"]
        np.testing.assert_allclose(merged, params["w"], atol=1e-5 if name != "loftq" else 0.02)
        assert (found[1]["w"].residual, found[1]["w"].frozen) == (
            adapter["w"].residual,
            adapter["w"].frozen,
        )


DAILY_KINDS = {("DoRA", "eval_shape"), ("Rows", "jit"), ("pissa of codes", "vmap"), ("many", "jit")}


@pytest.mark.parametrize(
    ("kind", "way"), every(DAILY_KINDS, ("DoRA", "Rows", "pissa of codes", "many"), WAYS)
)
def test_however_other_starts_are_called(kind: str, way: str) -> None:
    """DoRA's norms, rows of tables, codes that are factored, and a table of runs on one base."""
    params, x = {"w": array(64, 32)}, array(2, 64)
    apply, init = dense, None
    rule = LoRA("w", rank=2, init=pissa)
    if kind == "DoRA":
        rule = jlora.DoRA("w", rank=2, init=pissa)
    if kind == "Rows":
        apply, rule, x = lambda p, ids: p["w"][ids], jlora.Rows("w", [3, 5]), jnp.array([3])
    if kind == "pissa of codes":
        params = jlora.quantize(params, jlora.Int8("w"))
    lora = jlora.transform(apply, rule)
    if kind == "many":
        init = lambda key, *args: jlora.many.init(lora, key[None], *args, ranks=[2])  # noqa: E731
    init = init or lora.init
    found, expected = WAYS[way](init, params, x), init(KEY, params, x)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
    if "eval_shape" not in way:
        plain = jlora.dequantize(found[0])["w"]
        np.testing.assert_allclose(plain, jlora.dequantize(expected[0])["w"], atol=0.05)


@pytest.mark.parametrize("way", [way for way in WAYS if "closed" in way or way == "vmap"])
def test_what_is_closed_over_must_be_finite(way: str) -> None:
    lora, params, _, _, x = made("dense", pissa)
    with pytest.raises(ValueError, match="'w' of `params` has 1 values that are NaN or infinite"):
        WAYS[way](lora.init, {"w": params["w"].at[0, 0].set(jnp.inf)}, x)


def test_numpy_parameters() -> None:
    lora, params, base, _, x = made("dense", pissa)
    other, _ = lora.init(KEY, jax.tree.map(np.asarray, params), x)
    laws.assert_close(other["w"], base["w"], 1e-5)


def test_shapes_cannot_be_factored() -> None:
    lora, params, _, _, x = made("dense", pissa)
    expected = (
        r"`params` has a shape at 'w', but the start of LoRA\('w'\) factors its values. Give "
        "arrays, or call init under jax.eval_shape."
    )
    with pytest.raises(ValueError, match=expected):
        lora.init(KEY, jax.eval_shape(lambda: params), x)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: pissa_niter(-1), "`iterations` of pissa_niter must be an integer of at least 0"),
        (lambda: loftq(jlora.NF4(), 0), "`iterations` of loftq must be an integer of at least 1"),
        (lambda: loftq(jlora.NF4("w")), "`scheme` of loftq has the pattern 'w', but the rule says"),
        (
            lambda: made("dense", loftq(jlora.MXFP4())),
            r"loftq cannot quantize 'w'. `block` of MXFP",
        ),
        (
            lambda: jlora.DoRA("w", init=miss),
            r"`frozen` of DoRA\('w'\) must be \(\), as DoRA tr",
        ),
        (lambda: LoRA("w", frozen=("m",)), r"\('b',\); got \('m',\)\.$"),
        (lambda: LoRA("w", frozen="a b"), r"`frozen` of LoRA\('w'\) must be \(\), \('a',\) or"),
        (lambda: LoRA("w", frozen=("b",), init=miss), r"got \('b',\), and `init` freezes \('a',\)"),
    ],
)
def test_refusals(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_loftq_of_no_scheme() -> None:
    with pytest.raises(TypeError, match=r"`scheme` of loftq must be one such as jlora\.NF4"):
        loftq("nf4")  # pyright: ignore[reportArgumentType]


# ----------------------------------------------------------------------------- a base in fewer bits

SPECTRUM = (np.linalg.qr(array(128, 64))[0] / np.arange(1, 65) ** 0.5) @ np.linalg.qr(
    array(64, 64)
)[0]


def error(base: Any, adapter: Any, w: Any) -> float:
    """‖W - Q - s·A·B‖ / ‖W‖."""
    return float(np.linalg.norm(jlora.merge(base, adapter)["w"] - w) / np.linalg.norm(w))


@pytest.mark.slow
def test_the_rest_is_quantized_with_less_error() -> None:
    """NF4's error, LoftQ's by iterations, and that of PiSSA whose rest is quantized."""
    w, x = jnp.asarray(SPECTRUM, jnp.float32), array(1, 128)

    def lost(params: Any, init: Any) -> float:
        lora = jlora.transform(dense, LoRA("w", rank=8, init=init))
        return error(*lora.init(KEY, params, x), w)

    plain = lost(jlora.quantize({"w": w}, jlora.NF4("w")), None)
    each = [lost({"w": w}, loftq(jlora.NF4(), n)) for n in (1, 2, 5)]
    assert plain > each[0] > each[1] > each[2]
    base, adapter = jlora.transform(dense, LoRA("w", rank=8, init=pissa)).init(KEY, {"w": w}, x)
    assert error(jlora.quantize(base, jlora.NF4("w")), adapter, w) < each[2]


SCHEMES = {"NF4": jlora.NF4("w"), "Int8": jlora.Int8("w"), "Int4": jlora.Int4("w", group=32)}


@pytest.mark.parametrize(("name", "kind"), every({("pissa", "NF4")}, CHANGING, SCHEMES))
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
            jlora.merge({"w": 0 * params["w"]}, adapter),
            jlora.merge({"w": 0 * params["w"]}, expected),
            1e-4,
        )
        again = jlora.quantize(rest, SCHEMES[kind])
        laws.assert_close(jlora.dequantize(base), jlora.dequantize(again), 2e-2)
    assert error(base, adapter, plain["w"]) < 1.2 * float(jnp.max(packed["w"].error))
    laws.assert_same_codes(jax.jit(lora.init)(KEY, packed, x)[0]["w"].data, base["w"].data)


@pytest.mark.parametrize("form", every({("stack of slots",)}, FORMS))
def test_loftq_cuts_as_quantize_does(form: str) -> None:
    """Of each kind of site, with the slots that are not adapted quantized too."""
    lora, params, base, adapter, x = made(form, loftq(Pairs(), iterations=2))
    expected = jlora.quantize(params, Pairs("w"), sites=lora.sites(params, x))["w"]
    assert base["w"].form == expected.form
    assert jax.tree.structure(base["w"]) == jax.tree.structure(expected)
    assert error(base, adapter, params["w"]) < error({"w": expected}, {}, params["w"])
    assert base["w"].dtype == params["w"].dtype


def test_loftq_of_what_is_quantized() -> None:
    lora = jlora.transform(dense, LoRA("w", rank=2, init=loftq(jlora.NF4())))
    packed = jlora.quantize({"w": array(64, 32)}, jlora.NF4("w"))
    expected = (
        r"'w' of `params` is quantized already, as NF4\(block=64, double=True\), and loftq, the "
        r"start of LoRA\('w'\), quantizes it itself."
    )
    with pytest.raises(ValueError, match=expected):
        lora.init(KEY, packed, array(1, 64))


# ---------------------------------------------------------------------------------- trees and files


@pytest.mark.parametrize("name", every({("pissa_niter",), ("loftq",)}, (*CHANGING, "loftq")))
def test_resuming_needs_the_base_of_the_start(name: str, tmp_path: Any) -> None:
    """Made again by `init` with the same key; the parameters themselves are refused."""
    init = {**CHANGING, "loftq": loftq(jlora.Int8())}[name]
    lora, params, base, adapter, x = made("dense", init)
    rules = (lora.sites.args[1][0],)
    prints = checkpoint.fingerprint(base, values=True)
    checkpoint.save(tmp_path / name, laws.randomize(adapter), rules, base=prints)
    assert checkpoint.read(tmp_path / name).rules == rules
    again, _ = jlora.transform(dense, *checkpoint.read(tmp_path / name).rules).init(KEY, params, x)
    restored = checkpoint.restore(tmp_path / name, base=again)
    laws.assert_close(
        lora.apply(again, restored, x), lora.apply(base, laws.randomize(adapter), x), 0.0
    )
    with pytest.raises(ValueError, match="w: other values"):
        checkpoint.restore(tmp_path / name, base=params)


def test_an_initializer_of_a_scheme_of_ones_own_is_foreign(tmp_path: Any) -> None:
    lora, _, _, adapter, _ = made("dense", loftq(Pairs()))
    checkpoint.save(tmp_path / "a", adapter, lora.sites.args[1])
    [rule] = checkpoint.read(tmp_path / "a").rules
    with pytest.raises(NotImplementedError, match=r"`init` was loftq\(scheme=Pairs\(.*"):
        rule.init()


# --------------------------------------------------------------------------------------------- MiSS


@pytest.mark.parametrize("form", every({("dense",), ("odd stack",), ("heads",), ("slots",)}, FORMS))
def test_miss_repeats_rows(form: str) -> None:
    """ΔW[i, o] = s·B[i mod r, o]; where r does not divide the inputs too."""
    _, params, base, adapter, _ = made(form, miss)
    assert base["w"] is params["w"]
    node = adapter["w"]
    b = array(*node.b.shape)
    delta = jlora.merge({"w": jnp.zeros_like(params["w"])}, {"w": node._replace(b=b)})["w"]
    each = FORMS[form][-1](np.asarray(delta))
    blocks = np.asarray(b).reshape(len(each), RANK, -1)
    for matrix, block in zip(each, blocks, strict=True):
        i = np.arange(len(matrix)) % RANK
        np.testing.assert_allclose(matrix, ALPHA / RANK * block[i], rtol=1e-6)


def test_another_start_is_not_frozen_by_the_one_before() -> None:
    rule = LoRA("w", init=miss)
    assert (rule.frozen, rule.all_frozen) == ((), ("a",))
    other = dataclasses.replace(rule, init=None)
    assert other == LoRA("w")
    assert other.all_frozen == ()


def test_miss_trains_b_alone(tmp_path: Any) -> None:
    """Labels, counts, gradients, moments, updates, partitions and checkpoints."""
    lora, params, base, adapter, x = made("stack", miss)
    node = adapter["w"]
    assert lora.sites(params, x).trainable == jlora.count(adapter) == node.b.size
    labels = jlora.labels(adapter)["w"]
    assert (labels.a, labels.b) == ("base", "b")
    assert "frozen=('a',)" in repr(node)
    grads = jax.grad(lambda a: jnp.sin(lora.apply(base, a, x)).sum())(adapter)
    assert not np.any(grads["w"].a)
    assert np.any(grads["w"].b)

    tx = jlora.optimizer(optax.adamw(1e-2, weight_decay=0.1))
    whole = jlora.Params(base, adapter)
    for tree, slope in (
        (adapter, grads),
        (whole, jlora.Params(jax.tree.map(jnp.ones_like, base), grads)),
    ):
        state = tx.init(tree)
        assert jlora.count(state) < 3 * node.b.size
        updates, _ = tx.update(slope, state, tree)
        new = optax.apply_updates(tree, updates)
        new = new.adapter if isinstance(new, jlora.Params) else new
        np.testing.assert_array_equal(new["w"].a, node.a)
        assert np.any(new["w"].b)

    found = jlora.sharding.specs({"w": P("s", "i", "o")}, adapter)["w"]
    assert (found.a, found.b) == (P("s", "i", None), P("s", None, "o"))
    checkpoint.save(tmp_path / "a", adapter, lora.sites.args[1], base=base)
    restored = checkpoint.restore(tmp_path / "a", like=adapter, base=base)
    assert jax.tree.structure(restored) == jax.tree.structure(adapter)
    assert checkpoint.read(tmp_path / "a").rules[0].init is miss
    trained = {"w": node._replace(frozen=())}
    with pytest.raises(ValueError, match=r"w: expected frozen \('a',\), got \(\)"):
        checkpoint.restore(tmp_path / "a", like=trained)


def test_miss_among_adapters() -> None:
    """A sum of such is one, what is factored anew is none; tables take it with others."""
    lora, params, base, adapter, x = made("dense", miss)
    node = adapter["w"]
    one = {"w": node._replace(b=array(*node.b.shape))}
    _, other = jlora.transform(dense, LoRA("w", rank=RANK, alpha=ALPHA)).init(KEY, params, x)
    assert arithmetic.add([one, one])["w"].frozen == ("a",)
    assert arithmetic.add([one, other])["w"].frozen == ()
    assert arithmetic.truncate(arithmetic.add([one, one]), 2)["w"].frozen == ()
    table = jlora.many.stack([one, one])
    assert table["w"].frozen == ("a",)
    for refused in (
        lambda: jlora.many.stack([one, other]),
        lambda: jlora.many.insert(table, 0, other),
        lambda: jlora.many.insert(jlora.many.stack([other]), 0, one),
    ):
        with pytest.raises(ValueError, match=r"w: trains other factors in one than in another: `f"):
            refused()
    both = jlora.many.stack([{"w": one["w"]._replace(frozen=())}, other])
    assert both["w"].frozen == ()
    routed = jlora.many.route(lora.apply)(base, table, jnp.array([0, -1]), x)
    laws.assert_close(routed[0], lora.apply(base, one, x)[0], 1e-5)
    for form in ("side by side", "gathered"):
        apply = jlora.many.route(lora.apply, form=form)
        f = lambda t, f=apply: f(base, t, jnp.array([0, 1]), x).sum()  # noqa: E731
        grads = jax.jit(jax.grad(f))(table)
        assert not np.any(grads["w"].a)
        assert np.any(grads["w"].b)


@pytest.mark.parametrize("name", every({("pissa",), ("olora",), ("miss",)}, STARTS))
def test_adapters_of_a_changed_base_are_marked(name: str) -> None:
    """Also under transformations, for DoRA, and by initializers of one's own."""
    lora, params, base, adapter, x = made("dense", STARTS[name])
    changed = name != "miss"
    assert (base["w"] is not params["w"]) == adapter["w"].residual == changed
    assert ("residual=True" in repr(adapter)) == changed
    for init in (jax.jit(lora.init), lambda *args: jax.eval_shape(lora.init, *args)):
        assert init(KEY, params, x)[1]["w"].residual == changed
    if changed:
        dora = jlora.transform(dense, jlora.DoRA("w", rank=RANK, init=STARTS[name]))
        magnitude = dora.init(KEY, params, x)[1]["w"]
        assert magnitude.residual
        assert "residual=True" in repr(magnitude)


def test_a_changed_base_is_not_mistaken(tmp_path: Any) -> None:
    """For the parameters: in PEFT's files, merged exports, sums, tables and checkpoints."""
    lora, params, _, initial, x = made("dense", pissa)
    adapter = {"w": initial["w"]._replace(b=initial["w"].b + 1)}
    _, other = jlora.transform(dense, LoRA("w", rank=RANK, alpha=ALPHA)).init(KEY, params, x)
    names = [peft.Name("w", "model.w", "io")]
    refusal = re.escape(
        "`adapter` is for a base that an initializer changed, and not for the parameters that PEFT "
        "and engines have, at these paths:\n  w\nGive jlora.arithmetic.difference(adapter, initial)"
        ", where `initial` is what init returned, or merge it with its base. If that base is saved "
        "in the place of the parameters, give nodes that say so: node._replace(residual=False)."
    )
    with pytest.raises(ValueError, match=refusal):
        peft.save(tmp_path / "adapter", params, adapter, names)
    with pytest.raises(ValueError, match=refusal):
        peft.tensors(params, adapter, names)
    (tmp_path / "model").mkdir()
    save_file({"model.w.weight": np.zeros((10, 12), "f")}, tmp_path / "model/model.safetensors")
    with pytest.raises(ValueError, match=refusal):
        peft.export_merged(tmp_path / "model", adapter, tmp_path / "merged", names=names)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    whole = arithmetic.difference(adapter, initial)
    peft.save(tmp_path / "adapter", params, whole, names)
    loaded = peft.load(tmp_path / "adapter", params, names)
    expected = lora.apply(lora.init(KEY, params, x)[0], adapter, x)
    np.testing.assert_allclose(lora.apply(params, loaded, x), expected, atol=1e-5)
    own = {"w": adapter["w"]._replace(residual=False)}
    assert jax.tree.structure(own) != jax.tree.structure(adapter)
    peft.tensors(params, own, names)

    mixed = "w: is for the parameters in one, and in another for a base that its start changed"
    for combine in (
        arithmetic.add,
        jlora.many.stack,
        lambda pair: arithmetic.difference(*pair),
        lambda pair: jlora.many.insert(jlora.many.stack(pair[:1]), 0, pair[1]),
    ):
        with pytest.raises(ValueError, match=mixed):
            combine([adapter, other])
    assert arithmetic.truncate(adapter, 1)["w"].residual
    assert jlora.many.take(jlora.many.stack([adapter, initial]), 0)["w"].residual
    assert jlora.many.init(lora, jax.random.split(KEY, 2), params, x)[1]["w"].residual

    checkpoint.save(tmp_path / "checkpoint", adapter, lora.sites.args[1])
    assert checkpoint.restore(tmp_path / "checkpoint")["w"].residual
    with pytest.raises(ValueError, match="w: expected residual True, got False"):
        checkpoint.restore(tmp_path / "checkpoint", like=other)


# Of adapters of a reduced base: what is made of two, the same of their weights (of the parameters,
# of which W is given too), and whether it is for the reduced base again.
WEIGHED: dict[str, Any] = {
    "mean": (lambda t: arithmetic.add(t, [0.25, 0.75]), lambda x, y, _: x / 4 + 3 * y / 4, True),
    "beyond": (lambda t: arithmetic.add(t, jnp.array([-1, 2])), lambda x, y, _: 2 * y - x, True),
    "one": (lambda t: arithmetic.scale(t[0], 1), lambda x, y, _: x, True),
    "difference": (lambda t: arithmetic.difference(*t), lambda x, y, w: w + x - y, False),
    "zero": (lambda t: arithmetic.add(t, [2, -2]), lambda x, y, w: w + 2 * (x - y), False),
    "truncate": (lambda t: arithmetic.truncate(t[0], RANK), lambda x, y, _: x, True),
    "stack": (lambda t: many.take(many.stack(t), 1), lambda x, y, _: y, True),
    "insert": (
        lambda t: many.take(many.insert(many.stack([t[0]] * 2), 1, t[1]), 1),
        lambda x, y, _: y,
        True,
    ),
}


@pytest.mark.parametrize("start", [*CHANGING, "loftq"])
def test_what_is_made_of_adapters_of_a_changed_base(start: str) -> None:
    """Sums of models whose weights add up to 1; a difference, by which the base cancels."""
    init = {**CHANGING, "loftq": loftq(Pairs())}[start]
    _, params, base, initial, _ = made("dense", init)
    pair = [{"w": initial["w"]._replace(b=initial["w"].b + i)} for i in (1.0, -0.5)]
    weights = [jlora.merge(base, x)["w"] for x in pair]
    for make, expected, residual in WEIGHED.values():
        found = make(pair)
        assert found["w"].residual == residual
        actual = jlora.merge(base if residual else params, found)["w"]
        laws.assert_close(actual, expected(*weights, params["w"]), 1e-5)


ADD = ("`adapters` cannot be combined", "weights must add up to 1 or to 0; got ")
SCALE = ("`adapter` cannot be scaled", ADD[1])
TAKE = ("`other` cannot be subtracted from `adapter`", "and one adapter has no such site")
MERGE = ("`adapters` cannot be combined", "so that a ΔW of 0 is not the model")
FREE = ("a table cannot hold what is", "so that a slot without it would not be the model")
ROUTE = ("a table that is routed cannot hold what is", "so that -1 would not be the model")
UNSAID: dict[str, Any] = {
    "add": (lambda t: arithmetic.add([t, t]), ADD, "2"),
    "scale": (lambda t: arithmetic.scale(t, 0.5), SCALE, "0.5"),
    "traced": (lambda t: jax.jit(arithmetic.scale)(t, 0.5), SCALE, "traced ones"),
    "a site less": (lambda t: arithmetic.difference({}, t), TAKE, ""),
    "ties": (lambda t: arithmetic.ties([t, t]), MERGE, ""),
    "dare": (lambda t: arithmetic.dare([t, t], key=KEY), MERGE, ""),
    "free slots": (lambda t: many.stack([t], size=2), FREE, ""),
    "stack": (lambda t: many.stack([t, {}]), FREE, ""),
    "remove": (lambda t: many.remove(many.stack([t, t]), 0), FREE, ""),
    "insert": (lambda t: many.insert(many.stack([t, t]), jnp.array(0), {}), FREE, ""),
    "prepare": (lambda t: many.prepare(many.stack([t])), ROUTE, ""),
    "route": (lambda t: many.route(jlora.merge)({"w": X}, many.stack([t]), [0]), ROUTE, ""),
}
X = jnp.ones((12, 10))


@pytest.mark.parametrize("start", ["pissa", "loftq"])
@pytest.mark.parametrize("case", UNSAID)
def test_a_changed_base_without_its_adapter_is_not_the_model(case: str, start: str) -> None:
    adapter = made("dense", STARTS[start])[3]
    f, (refusal, why), got = UNSAID[case]
    why = f"so that {why}{got}" if got else why
    expected = (
        f"{refusal} at these paths:\n  w: is for a base that its start changed, {why}\nGive "
        "jlora.arithmetic.difference(adapter, initial) in its place, where `initial` is what init "
        "returned: that is for the parameters."
    )
    with pytest.raises(ValueError, match=exactly(expected)):
        f(adapter)


def test_sites_of_two_bases_have_no_distance() -> None:
    _, params, _, initial, x = made("dense", pissa)
    _, other = jlora.transform(dense, LoRA("w", rank=RANK)).init(KEY, params, x)
    assert float(analysis.distance(initial["w"], initial["w"])) < 1e-4
    with pytest.raises(ValueError, match=r"`node` and `other` must be for one base, but one of"):
        analysis.distance(initial["w"], other["w"])


def test_a_rule_freezes_a_factor() -> None:
    """B at chance and fixed, A zero and trained: MiCA's form."""

    def swapped(key: Any, w: Any, site: Any, rule: Any) -> Any:
        _, a, b = initializers.gaussian(key, w, site, rule)
        return w, 0 * a, jax.random.normal(key, b.shape)

    lora, _, base, adapter, x = made("dense", swapped, frozen=("b",))
    assert lora.sites(base, x).trainable == jlora.count(adapter) == adapter["w"].a.size
    grads = jax.grad(lambda a: jnp.sin(lora.apply(base, a, x)).sum())(adapter)["w"]
    assert np.any(grads.a)
    assert not np.any(grads.b)
    assert jlora.labels(adapter)["w"].b == "base"


@pytest.mark.parametrize("frozen", [3, ["c"], [["a"]]], ids=str)
def test_a_checkpoint_that_freezes_nonsense_is_damaged(frozen: Any, tmp_path: Any) -> None:
    lora, _, _, adapter, _ = made("dense", miss)
    checkpoint.save(tmp_path / "a", adapter, lora.sites.args[1])
    [file] = (tmp_path / "a").glob("*/metadata")
    fields = json.loads(file.read_text())
    fields["adapter"][0]["frozen"] = frozen
    file.write_text(json.dumps(fields | {"sha256": digest(fields)}))
    with pytest.raises(ValueError, match=r"damaged .*`frozen` must name arrays of LowRank"):
        checkpoint.read(tmp_path / "a")
