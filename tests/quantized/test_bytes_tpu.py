"""Bytes that a layer's step moves on a TPU, as its compiler counts them.

They are fewer than those of the form that one would write by hand. The limits over the floor's are
those of small layers, which have more of them beside the weights than large ones.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from small import some, some_rows

import jlora
from jlora._compat import HURRIED
from tests.bench import fusions, logits, tpu, traffic

pytest.importorskip("libtpu")

GROUPED = tpu.SMALL._replace(groups=2)
LIMITS = [
    (tpu.SMALL, 1.48),
    (GROUPED, 1.38),
    (GROUPED._replace(layers=2, remat=True), 1.34),
    (GROUPED._replace(experts=4, hidden=1408), 1.24),
]
OPTIONS = jlora.compiler_options("tpu")
step = functools.cache(tpu.step)
CHOICES = {"q, v": r"[qv]", "all-linear": r"w/(?!norm).*"}
HURRIED_LIMITS = [  # over the floor's bytes, without and with the compiler option
    *((chip, "q, v", 1.09, 1.06) for chip in ("v5e", "v6e", "v5p")),
    *(("v5e", "all-linear", 1.54, 1.34), ("v6e", "all-linear", 1.46, 1.21)),
    ("v5p", "all-linear", 1.45, 1.23),
]


@functools.cache
def hurried(chip, *form, fused=False):
    """A small layer as it is compiled in seconds: fused as always, with all in main memory."""
    return tpu.step(tpu.SMALL, chip, *form, options=HURRIED | (OPTIONS if fused else {}))


@pytest.mark.parametrize(
    ("chip", "trained", "alone", "fused"),
    some_rows(HURRIED_LIMITS, HURRIED_LIMITS[0], HURRIED_LIMITS[3], HURRIED_LIMITS[5]),
)
def test_bytes_over_the_floor(chip, trained, alone, fused):
    """The options fuse sums with h·B into the products with W, at no operation more."""
    floor, form = hurried(chip, "floor"), ("jlora", 8, CHOICES[trained])
    ours, with_option = hurried(chip, *form), hurried(chip, *form, fused=True)
    assert ours.size <= alone * floor.size
    assert with_option.size <= fused * floor.size
    assert with_option.flops <= ours.flops


@pytest.mark.parametrize("chip", ["v5e", "v6e", "v5p"])
def test_a_wide_layer(chip):
    """With the options, which the compiler knows; LoRA cannot do without 4.5% on a v5e."""
    assert len(OPTIONS) == 2
    floor = tpu.step(fusions.WIDE, chip, "floor", options=HURRIED)
    ours = tpu.step(fusions.WIDE, chip, "jlora", fusions.RANK, options=HURRIED | OPTIONS)
    assert ours.size <= 1.06 * floor.size


FLASH_LIMITS = [
    *((chip, fusions.FLASH, 1.38) for chip in ("v5e", "v6e", "v5p")),
    *(("v5e", fusions.SPLIT, 1.21), ("v6e", fusions.SPLIT, 1.15), ("v5p", fusions.SPLIT, 1.12)),
]


@pytest.mark.parametrize(
    ("chip", "layer", "limit"), some_rows(FLASH_LIMITS, FLASH_LIMITS[0], FLASH_LIMITS[3])
)
def test_a_layer_with_a_flash_attention(chip, layer, limit):
    """Of Llama 7B, over the frozen layer; weights that are split into heads save copies.

    LoRA cannot do without 22%. Frozen, a layer with such weights moves 0.88.
    """
    floor = tpu.step(fusions.FLASH, chip, "floor", options=HURRIED)
    ours = tpu.step(layer, chip, "jlora", fusions.RANK, options=HURRIED | OPTIONS)
    assert ours.moved <= limit * floor.moved


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "limit"), LIMITS)
def test_all_linear(layer, limit):
    floor, plain, ours = (step(layer, "v5e", form, 8) for form in ("floor", "plain", "jlora"))
    assert ours.size <= limit * floor.size
    assert ours.size <= 0.98 * plain.size
    assert ours.flops <= plain.flops


@pytest.mark.slow
def test_a_layer_of_llama_7b():
    """Of the size of the real one, where what moves no longer fits in the core's own memory."""
    floor, plain, ours = (step(tpu.LLAMA, "v5e", form, 16) for form in ("floor", "plain", "jlora"))
    assert ours.size <= 1.24 * floor.size
    assert ours.moved <= 1.24 * floor.moved
    assert ours.moved <= 0.99 * plain.moved


@pytest.mark.parametrize("head", some(logits.HEADS, "frozen"))
def test_logits_are_never_whole(head):
    logits.check("v5e", head)


@pytest.mark.parametrize("rank", some([8, 64], 64))
def test_merging_forms_no_delta(rank):
    """Of many leaves, in place: each is read and written once, and no other array of its size."""
    mesh, n = tpu.mesh_for("v5e:2x2", (1, 1)), 8192  # too large for the core's own memory
    params = {f"w{i}": tpu.spec(mesh, (n, n), PartitionSpec()) for i in range(4)}
    lora = jlora.transform(lambda p, x: [x @ w for w in p.values()], jlora.LoRA(rank=rank))
    x = jax.ShapeDtypeStruct((1, n), jnp.bfloat16)
    adapter = jax.eval_shape(lora.init, jax.random.key(0), params, x)[1]
    on_mesh = jax.tree.map(lambda v: tpu.spec(mesh, v.shape, PartitionSpec()), (params, adapter))
    merge = jax.jit(jlora.merge, donate_argnums=0).lower(*on_mesh).compile()
    assert merge.memory_analysis().temp_size_in_bytes == 0
    assert traffic.main_memory(merge.as_text()) == pytest.approx(2 * 4 * 2 * n * n, rel=0.02)


WIDE = tpu.SMALL._replace(dim=2048, hidden=5632, heads=16, groups=16, batch=64)
ROUTED = [(32, 0, 1.5), (1, 0, 2.1), (1, 4, 2.1)]  # tokens, layers, bytes over one adapter's


@pytest.mark.parametrize(("length", "layers", "moved"), some_rows(ROUTED, ROUTED[2]))
def test_gathered_adapters(length, layers, moved):
    """64 of rank 16 take one's operations; a scan takes rows of its own layer out of the table."""
    shape = WIDE._replace(length=length, layers=layers)
    one, ours = tpu.routed(shape, 1, None), tpu.routed(shape, 64, "gathered", prepared=True)
    assert ours.flops <= 1.05 * one.flops
    assert ours.moved <= moved * one.moved


@pytest.mark.slow
def test_query_and_value():
    floor, ours = (step(tpu.SMALL, "v5e", *form) for form in (["floor"], ["jlora", 8, r"[qv]"]))
    assert ours.size <= 1.08 * floor.size


def test_what_moves():
    """A product reads both operands and writes its result; a scan reads of a stack one matrix."""
    mesh = tpu.mesh_for("v5e:2x2", (1, 1))
    n = 8192  # of which no matrix fits in the core's own memory
    x, stack = (tpu.spec(mesh, shape, PartitionSpec()) for shape in [(n, n), (64, n, n)])

    def matrices(f, *args):
        return traffic.main_memory(jax.jit(f).lower(*args).compile().as_text()) / (2 * n * n)

    assert matrices(jnp.dot, x, x) == pytest.approx(3, rel=0.01)
    once = matrices(
        lambda x, stack: jax.lax.scan(lambda y, w: (y @ w, None), x, stack)[0], x, stack
    )
    assert 3 <= once <= 8  # with what is before and after the loop
