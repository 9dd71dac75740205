"""What a quantized base costs on TPUs, as their compiler counts it.

Memory: one weight is unpacked at a time, in whatever form the layers are. Traffic: codes move, not
values. Work: that of the step on a dense base.
"""

import argparse
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pod
import pytest
from chain import FORMS
from collectives import collectives
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from small import some, some_rows

import jlora
from jlora import NF4, LoRA, sharding
from jlora._compat import HURRIED
from jlora._tree import size_in_bytes
from tests.bench import tpu, traffic

pytest.importorskip("libtpu")

DIM, TOKENS = 4096, 512
W = 2 * DIM * DIM  # bytes of a weight in bfloat16
BITS = 4 + 8 / 64 + 32 / (64 * 256)


def placed(tree, places):
    """The shapes of arrays, with a sharding for each."""
    return jax.tree.map(
        lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), tree, places
    )


# ------------------------------------------------------------------------------- a chain of layers


def compiled(form, layers, mesh, scheme, *spec):
    """The gradient step of a chain of weights along `spec`, codes gathered whole; its operands."""
    stack = (layers,) if "scan" in form else ()
    names = ["w"] if stack else [f"w{i}" for i in range(layers)]
    weight = jax.ShapeDtypeStruct((*stack, DIM, DIM), jnp.bfloat16)
    place = NamedSharding(mesh, P(*[None] * len(stack), *spec))
    params, places = dict.fromkeys(names, weight), dict.fromkeys(names, place)
    if scheme is not None:
        params = jlora.quantize(params, scheme)
    lora = jlora.transform(FORMS[form], LoRA(r"w\d*", rank=8, dtype=jnp.bfloat16))
    x = tpu.spec(mesh, (mesh.size, TOKENS, DIM), P("fsdp"))
    base, adapter = jax.eval_shape(lora.init, jax.random.key(0), params, x)
    adapter = placed(adapter, sharding.specs(places, adapter))
    base = placed(base, places if scheme is None else sharding.specs(places, base))
    whole = sharding.replicated(places, "fsdp")

    def loss(adapter, base, x):
        base = sharding.gathered(base, whole)
        return (lora.apply(base, adapter, x).astype(jnp.float32) ** 2).sum()

    operands = (adapter, base, x)
    return jax.jit(jax.value_and_grad(loss)).lower(*operands).compile(), operands


@pytest.mark.parametrize("form", some(FORMS, "scan+remat"))
def test_one_weight_at_a_time(form):
    """Of the many, two at most are unpacked at once: one in use, and the next."""
    mesh, layers = tpu.mesh_for("v5e:2x2", (1, 1)), 8
    dense, _ = compiled(form, layers, mesh, None)
    ours, (adapter, _, x) = compiled(form, layers, mesh, NF4(r"w\d*"))
    dense, ours = dense.memory_analysis(), ours.memory_analysis()
    assert ours.temp_size_in_bytes <= dense.temp_size_in_bytes + 2 * W
    base = ours.argument_size_in_bytes - size_in_bytes((adapter, x))
    assert 8 * base / (layers * DIM * DIM) == pytest.approx(BITS, rel=0.01)


GATHERED = [("plain", 2, P("fsdp")), ("scan+remat", 4, P(None, "fsdp"))]


@pytest.mark.parametrize(("form", "layers", "spec"), some_rows(GATHERED, GATHERED[1]))
def test_codes_are_gathered(form, layers, spec):
    """Over four devices, each weight once a pass or once for both."""
    mesh = tpu.mesh_of("v5e:2x2", {"fsdp": 4})

    def gathered(scheme):
        found = collectives(compiled(form, layers, mesh, scheme, *spec)[0].as_text())
        return sum(c.size * c.count for c in found if c.kind == "all-gather")

    dense, ours = map(gathered, (None, NF4(r"w\d*")))
    assert dense >= layers * W * 3 / 4  # a quarter is there
    assert ours <= 0.55 * dense


def test_the_work_is_that_of_a_dense_base():
    mesh, rank = tpu.mesh_for("v5e:2x2", (1, 1)), 16
    weights = {k: tpu.spec(mesh, s, P()) for k, s in tpu.SMALL.weights().items()}
    base = jlora.quantize({"w": weights}, NF4(r"w/(?!norm).*"))
    x = tpu.spec(mesh, (tpu.SMALL.batch, tpu.SMALL.length, tpu.SMALL.dim), P())
    rule = LoRA(r"w/(?!norm).*", rank=rank, alpha=tpu.SCALE * rank, dtype=jnp.bfloat16)
    lora = jlora.transform(functools.partial(tpu.model, shape=tpu.SMALL), rule)
    base, adapter = jax.eval_shape(lora.init, jax.random.key(0), base, x)
    everywhere = NamedSharding(mesh, P())
    base, adapter = (placed(t, jax.tree.map(lambda _: everywhere, t)) for t in (base, adapter))

    def both(adapter, base, x, g):
        y, back = jax.vjp(lambda adapter, x: lora.apply(base, adapter, x), adapter, x)
        return y, back(g)

    ours = jax.jit(both).lower(adapter, base, x, x).compile(HURRIED).cost_analysis()["flops"]
    dense = tpu.step(tpu.SMALL, "v5e", "jlora", rank, options=HURRIED).flops
    assert ours <= 1.02 * dense


# ---------------------------------------------------------------------------------------- experts


EXPERTS, HIDDEN, EACH = 8, 3584, 512  # a stack that a core's own memory has no room for


def ragged(w, x):
    return jax.lax.ragged_dot(x, w, jnp.full(EXPERTS, EACH))


def batched(w, x):
    return jnp.einsum("etd,edf->etf", x.reshape(EXPERTS, EACH, DIM), w)


def one_by_one(w, x):
    """The rows of each expert with its matrix, in a loop."""
    return jax.lax.map(lambda own: own[0] @ own[1], (x.reshape(EXPERTS, EACH, DIM), w))


# The bytes that move to and from main memory on a base in few bits, over those in bfloat16.
MOVED = [
    *((ragged, NF4("w"), 1.1), (ragged, jlora.Int8("w"), 1.25)),
    *((one_by_one, NF4("w"), 0.45), (batched, NF4("w"), 2.2)),
]


@functools.cache
def moved(form, scheme):
    """Bytes of the forward and backward pass of one product with all experts."""
    mesh = tpu.mesh_for("v5e:2x2", (1, 1))
    base = {"w": tpu.spec(mesh, (EXPERTS, DIM, HIDDEN), P())}
    x = tpu.spec(mesh, (EXPERTS * EACH, DIM), P())
    lora = jlora.transform(lambda p, x: form(p["w"], x), LoRA(rank=8, dtype=jnp.bfloat16))
    adapter = jax.eval_shape(lora.init, jax.random.key(0), base, x)[1]
    base = base if scheme is None else jlora.quantize(base, scheme)
    everywhere = NamedSharding(mesh, P())
    base, adapter = (placed(t, jax.tree.map(lambda _: everywhere, t)) for t in (base, adapter))

    def both(adapter, base, x):
        y, back = jax.vjp(lambda adapter, x: lora.apply(base, adapter, x), adapter, x)
        return y, back(y)

    return traffic.main_memory(jax.jit(both).lower(adapter, base, x).compile().as_text(), EXPERTS)


@pytest.mark.parametrize(("form", "scheme", "limit"), some_rows(MOVED, MOVED[0]))
def test_experts(form, scheme, limit):
    """For `ragged_dot` each is unpacked on its own; a stack of all is written and read again."""
    assert moved(form, scheme) <= limit * moved(form, None)


# --------------------------------------------------------------------------------- Llama as it is


def plan(shape, mesh, method):
    """`jlora.plan` of a LoRA step of one of `pod`'s models."""
    args = argparse.Namespace(shape=shape, rank=16, rows=1, length=2048)
    with nn.logical_axis_rules(pod.RULES):
        step = pod.plan_step(args, method, mesh)
        with jax.set_mesh(mesh):
            return jlora.plan(*step, compiler_options=HURRIED)


def one_chip():
    devices = tpu.mesh_for("v5e:2x2", (1, 1)).devices
    return Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def test_7b_on_one_chip():
    """A step of 1 × 2,048 tokens fits; on a base in bfloat16, 4/5 of the memory, it does not."""
    compiled, dense = (plan("7b", one_chip(), method) for method in ("nf4", "all"))
    assert compiled.fits
    assert dense.fits is False
    assert compiled.base < 0.31 * dense.base


@pytest.mark.slow
def test_70b_on_a_slice():
    """Sixteen chips of 16 GB each."""
    mesh = tpu.mesh_of("v5e:4x4", {"fsdp": 2, "tensor": 8})
    assert plan("70b", mesh, "nf4").fits
