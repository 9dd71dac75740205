"""Starts on a mesh of eight devices.

W lies as it did, along automatic and explicit axes; products and small factorizations move nothing
of W's size.
"""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from collectives import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small import every, some

import jlora
from jlora.initializers import loftq, miss, olora, pissa, pissa_niter

LAYERS, INPUTS, OUTPUTS, RANK = 4, 64, 128, 2
SPECS = {"inputs": P(None, "d"), "outputs": P(None, None, "d"), "stack": P("d")}
STARTS = {"pissa": pissa, "pissa_niter": pissa_niter(40), "olora": olora, "miss": miss}
MESHES = {
    kind: jax.make_mesh((4,), ("d",), (kind,), devices=jax.devices()[:4])
    for kind in (AxisType.Auto, AxisType.Explicit)
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def model(p, x):
    return jax.lax.map(lambda wx: wx[1] @ wx[0], (p["w"], x))


PARAMS, X = (
    {"w": normal(0, LAYERS, INPUTS, OUTPUTS)},
    jax.ShapeDtypeStruct((LAYERS, 1, INPUTS), "f4"),
)


def init(start, params):
    """Base and adapter; the model is traced on shapes, which lie nowhere."""
    lora = jlora.transform(model, jlora.LoRA("w", rank=RANK, alpha=RANK, init=start))
    site = lora.sites(jax.eval_shape(lambda: PARAMS), X)["w"]
    w, a, b = start(jax.random.key(0), params["w"], site, site.rule)
    return w, a, b


DAILY = [("pissa", "inputs", AxisType.Auto), ("olora", "stack", AxisType.Explicit)]


@pytest.mark.parametrize(("name", "spec", "kind"), every(STARTS, SPECS, MESHES, daily=DAILY))
def test_the_base_lies_where_it_did(name, spec, kind):
    place = NamedSharding(MESHES[kind], SPECS[spec])
    expected = init(STARTS[name], PARAMS)
    with jax.set_mesh(MESHES[kind]):
        put = jax.device_put(jax.device_get(PARAMS), place)
        w, a, b = init(STARTS[name], put)
        assert w.sharding.is_equivalent_to(place, 3)
    of = lambda a, b: np.asarray(a) @ np.asarray(b)  # noqa: E731 - signs are free
    laws.assert_close((np.asarray(w), of(a, b)), (np.asarray(expected[0]), of(*expected[1:])), 1e-4)


LOFTQ = loftq(jlora.NF4())


@pytest.mark.parametrize(
    ("start", "kind"), every([pissa, LOFTQ], MESHES, daily=[(LOFTQ, AxisType.Explicit)])
)
def test_codes(start, kind):
    """As on one device; what was quantized before lies as it did."""
    given = jlora.quantize(PARAMS, jlora.NF4("w")) if start is pissa else PARAMS
    place = {"w": NamedSharding(MESHES[kind], SPECS["outputs"])}
    place = jlora.sharding.specs(place, given) if start is pissa else place
    w, *_ = expected = init(start, given)
    with jax.set_mesh(MESHES[kind]):
        put = jax.device_put(jax.device_get(given), place)
        actual = init(start, put)
    assert actual[0].form == w.form
    if start is pissa:
        lies = lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim)  # noqa: E731
        assert all(jax.tree.leaves(jax.tree.map(lies, actual[0], put["w"])))
    a, b = (whole(*jax.device_get(made)) for made in (actual, expected))
    assert np.linalg.norm(a - b) < 1e-2 * np.linalg.norm(b)  # a value may be between two codes


def whole(w, a, b):
    """What the codes stand for, and A·B."""
    return np.asarray(jlora.dequantize({"w": w})["w"]) + a @ b


@pytest.mark.parametrize("spec", some(SPECS, "inputs"))
@pytest.mark.parametrize("name", ["pissa_niter", "olora"])
def test_nothing_of_the_size_of_a_matrix_moves(name, spec):
    """Under jit; what moves in one collective is smaller than a matrix."""
    place = NamedSharding(MESHES[AxisType.Auto], SPECS[spec])
    put = jax.device_put(jax.device_get(PARAMS), place)
    f = jax.jit(lambda p: init(STARTS[name], p), out_shardings=(place, None, None))
    moved = collectives(f.lower(put).compile().as_text())
    columns = 4 * LAYERS * (RANK + 8) * max(INPUTS, OUTPUTS)
    assert max((c.size for c in moved), default=0) <= columns < PARAMS["w"].nbytes


def test_init_of_a_part_is_refused():
    def part(w):
        return init(pissa, {"w": w})[1]

    f = jax.shard_map(part, mesh=MESHES[AxisType.Auto], in_specs=P("d"), out_specs=P("d"))
    expected = r"the start of LoRA\('w'\) factors the whole of 'w', of which a shard_map"
    with pytest.raises(NotImplementedError, match=expected):
        f(PARAMS["w"])
