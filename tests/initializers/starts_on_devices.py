"""Starts on a mesh of eight devices.

W lies as it did, along automatic and explicit axes; products and small factorizations move nothing
of W's size.
"""

import itertools

import jax
import laws
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import assert_lies, compiled, lines, moved, normal, on
from small import some

import jlora
from jlora.initializers import loftq, miss, olora, paca, pissa, pissa_niter

LAYERS, INPUTS, OUTPUTS, RANK = 4, 64, 128, 2
SPECS = {"inputs": P(None, "d"), "outputs": P(None, None, "d"), "stack": P("d")}
STARTS = {
    "pissa": pissa,
    "pissa_niter": pissa_niter(40),
    "olora": olora,
    "miss": miss,
    "paca": paca,
}
LINES = lines()
AUTO, EXPLICIT = LINES
X = jax.ShapeDtypeStruct((LAYERS, 1, INPUTS), "f4")
PARAMS = {"w": normal(0, LAYERS, INPUTS, OUTPUTS).astype("f4")}


def model(p, x):
    return jax.lax.map(lambda wx: wx[1] @ wx[0], (p["w"], x))


def init(start, params):
    """W, A and B; the model is traced on shapes, which lie nowhere."""
    lora = jlora.transform(model, jlora.LoRA("w", rank=RANK, alpha=RANK, init=start))
    site = lora.sites(jax.eval_shape(lambda: PARAMS), X)["w"]
    return start(jax.random.key(0), params["w"], site, site.rule)


def values(w, a, b):
    """W, or what its codes stand for, and A·B, as signs are free."""
    w, a, b = jax.device_get((w, a, b))
    return np.asarray(jlora.dequantize({"w": w})["w"]), np.asarray(a) @ np.asarray(b)


def every_place():
    """Every start and spec on both meshes; one of them every day."""
    daily = {("olora", "stack", EXPLICIT)}
    rows = itertools.product(STARTS, SPECS, LINES)
    return [pytest.param(*r, marks=[] if r in daily else pytest.mark.slow) for r in rows]


@pytest.mark.parametrize(("name", "spec", "kind"), every_place())
def test_the_base_lies_where_it_did(name, spec, kind):
    place = on(LINES[kind], {"w": SPECS[spec]})
    expected = init(STARTS[name], PARAMS)
    with jax.set_mesh(LINES[kind]):
        w, a, b = init(STARTS[name], jax.device_put(jax.device_get(PARAMS), place))
        assert_lies(w, place["w"])
    laws.assert_close(values(w, a, b), values(*expected), 1e-4)


OF_CODES = {"pissa": pissa, "to 4 bits": loftq(jlora.NF4()), "to 8 bits": loftq(jlora.Int8())}


@pytest.mark.parametrize("kind", some(LINES, EXPLICIT))
@pytest.mark.parametrize("name", some(OF_CODES, "to 8 bits"))
def test_codes(name, kind):
    """As on one device; what was quantized before lies as it did."""
    start = OF_CODES[name]
    given = jlora.quantize(PARAMS, jlora.NF4("w")) if name == "pissa" else PARAMS
    places = jlora.sharding.specs(on(LINES[kind], {"w": SPECS["outputs"]}), given)
    expected = init(start, given)
    with jax.set_mesh(LINES[kind]):
        actual = init(start, jax.device_put(jax.device_get(given), places))
    assert actual[0].form == expected[0].form
    if name == "pissa":
        assert_lies(actual[0], places["w"])
    a, b = (sum(values(*x)) for x in (actual, expected))
    assert np.linalg.norm(a - b) < 1e-2 * np.linalg.norm(b)  # a value may be between two codes


@pytest.mark.parametrize("spec", some(SPECS, "inputs"))
@pytest.mark.parametrize("name", some(["pissa_niter", "olora"], "olora"))
def test_nothing_of_the_size_of_a_matrix_moves(name, spec):
    """Under jit; what moves in one collective is smaller than a matrix."""
    place = on(LINES[AUTO], {"w": SPECS[spec]})
    f = jax.jit(lambda p: init(STARTS[name], p), out_shardings=(place["w"], None, None))
    found = moved(compiled(f, jax.device_put(jax.device_get(PARAMS), place)))
    most = LAYERS * (RANK + 8) * max(INPUTS, OUTPUTS)
    assert max((n for _, n in found), default=0) <= most < PARAMS["w"].size


def test_init_of_a_part_is_refused():
    part = lambda w: init(pissa, {"w": w})[1]  # noqa: E731
    f = jax.shard_map(part, mesh=LINES[AxisType.Auto], in_specs=P("d"), out_specs=P("d"))
    expected = r"the `init` of LoRA\('w'\) factors the whole of 'w', but the shard_map"
    with pytest.raises(NotImplementedError, match=expected):
        f(PARAMS["w"])
