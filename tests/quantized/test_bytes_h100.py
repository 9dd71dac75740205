"""Kernels of a layer's step on an H100 and the bytes that they move, by XLA without the device.

They are fewer than those of the form that one would write by hand. No kernel is there for the sum
x·W + h·B alone: it is part of a product, or of a kernel that the frozen layer has too.
"""

import functools

import pytest
from small import some, some_rows

pytest.importorskip("jax_cuda12_plugin")

from tests.bench import gpu, logits

step = functools.cache(gpu.step)
# layer, kernels of products, the most bytes of all-linear and of q, v over the floor's
CASES = [
    (gpu.SMALL, "cuBLAS", 1.55, 1.03),
    (gpu.SMALL, "Triton", 1.52, 1.13),
    (gpu.LAYER, "cuBLAS", 1.075, 1.02),
    (gpu.LAYER, "Triton", 1.085, 1.02),
    (gpu.FLASH, "cuBLAS", 1.65, 1.1),
    (gpu.FLASH, "Triton", 1.6, 1.09),
]
ROWS = some_rows(CASES, CASES[0])


@pytest.mark.parametrize(("layer", "kernels", "limit", "_"), ROWS)
def test_all_linear(layer, kernels, limit, _):
    floor, plain, ours = (
        step(layer, kernels, *gpu.FORMS[form]) for form in ("floor", "by hand", "all-linear")
    )
    assert ours.size <= limit * floor.size
    assert ours.size <= 0.995 * plain.size
    assert ours.kernels < plain.kernels
    assert ours.passes <= min(floor.passes + 1, plain.passes)


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "kernels", "_", "limit"), CASES)
def test_query_and_value(layer, kernels, _, limit):
    floor, ours = (step(layer, kernels, *gpu.FORMS[form]) for form in ("floor", "q, v"))
    assert ours.size <= limit * floor.size
    assert ours.passes <= floor.passes + 2


@pytest.mark.parametrize("head", some(logits.HEADS, "frozen"))
def test_logits_are_never_whole(head):
    logits.check("H100", head)
