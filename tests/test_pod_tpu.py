"""Collectives and memory of steps compiled for TPU slices, beside those of the frozen step.

The floor is the step with frozen weights in which only the norms' scales are trained. LoRA adds the
gathering of A and B, once a step, and the sum of their gradients, and nothing of the size of an
activation or a weight.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("libtpu")

import pod
import pod_plan
from models import gpt, llama
from models.parts import RULES, SEQUENCE_RULES

from jlora import _compat

LENGTH = 1024
MODELS = {
    "llama": llama.Llama(llama.Config(2048, 2, 2048, 5632, 16, 16, tied=False), **pod.LARGE),
    "gpt": gpt.GPT(gpt.Config(2048, LENGTH, 2, 2048, 16), **pod.LARGE),
}
V5P, V5E = "v5p:2x2x2", "v5e:2x4"
# model, topology, devices along fsdp and tensor, whether tokens are cut between the layers, adapted
CASES = [
    ("llama", V5P, (4, 2), False, "qv"),
    ("llama", V5P, (4, 2), False, "all"),
    ("llama", V5P, (4, 2), True, "qv"),
    ("llama", V5P, (4, 2), True, "all"),
    ("llama", V5P, (8, 1), False, "all"),
    ("llama", V5P, (1, 8), False, "all"),
    ("llama", V5E, (4, 2), False, "qv"),
    ("llama", V5E, (4, 2), False, "all"),
    ("gpt", V5P, (4, 2), False, "qv"),
    ("gpt", V5P, (4, 2), False, "all"),
]


@functools.cache
def row(model, topology, axes, sequence, method):
    """What a step needs, from a compiler in a hurry; one at a time, as each takes seconds."""
    pod.SHAPES["test"] = pod.Shape(MODELS[model], LENGTH)
    args = argparse.Namespace(shape="test", rank=8, rows=1, length=LENGTH)
    names = SEQUENCE_RULES if sequence else RULES
    job = functools.partial(pod.plan_step, args)
    return pod_plan.measure(method, topology, axes, job, names, _compat.HURRIED)


@pytest.mark.parametrize(("model", "topology", "axes", "sequence", "method"), CASES)
def test_the_floor(model, topology, axes, sequence, method):
    floor = row(model, topology, axes, sequence, "floor")
    found = row(model, topology, axes, sequence, method)
    print(floor.collectives, found.collectives)
    count, size = found.collectives["total"]
    least, smallest = floor.collectives["total"]
    leaves, adapter = sizes(model, method)
    assert count <= 1.01 * least + leaves
    # Gathered in bfloat16, and the gradient summed in float32.
    assert size <= 1.01 * smallest + 1.5 * adapter
    assert found.plan.peak <= 1.02 * floor.plan.peak + 4 * adapter


def sizes(model, method):
    """How many factors there are, and the bytes of all."""
    lora = pod.jlora.transform(MODELS[model].apply, *pod.make_rules(MODELS[model], method, 8))
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    base = jax.eval_shape(lambda key: pod.nn.unbox(MODELS[model].init(key, ids)), jax.random.key(0))
    _, adapter = jax.eval_shape(lora.init, jax.random.key(0), base, ids)
    leaves = jax.tree.leaves(adapter)
    return len(leaves), sum(x.size * x.dtype.itemsize for x in leaves)
