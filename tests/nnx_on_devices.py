"""Modules of NNX on a mesh: A, B and their moments lie and are labeled like W."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import jlora

NAMES = {"logical": ("embed", "mlp"), "mesh": ("fsdp", "tensor")}
A, B = PartitionSpec("fsdp", None), PartitionSpec(None, "tensor")


@pytest.mark.parametrize("names", NAMES)
def test_an_adapter_lies_like_its_base(names: str) -> None:
    """By metadata of logical axes or of the mesh's; the step leaves A and B where they were."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2)
    start = nnx.with_partitioning(nnx.initializers.lecun_normal(), NAMES[names])
    x = jnp.ones((8, 16))
    with jax.set_mesh(mesh), nnx.logical_axis_rules([("embed", "fsdp"), ("mlp", "tensor")]):
        model = nnx.Linear(16, 8, rngs=nnx.Rngs(0), kernel_init=start)
        adapted = jlora.nnx.adapt(model, jlora.LoRA(rank=2), rngs=nnx.Rngs(1), example=(x,))
        optimizer = nnx.Optimizer(adapted, optax.adam(0.1), wrt=nnx.LoRAParam)
        merged = adapted.merged()

        @nnx.jit(graph=False)
        def step(model: nnx.Module, optimizer: nnx.Optimizer) -> None:
            trained = nnx.DiffState(0, nnx.LoRAParam)
            gradient = nnx.grad(lambda model: model(x).sum(), argnums=trained)(model)
            optimizer.update(model, gradient)

        step(adapted, optimizer)
    own, labels = adapted.adapter["kernel"], adapted.lora["kernel"]
    assert merged.kernel.sharding.spec == PartitionSpec("fsdp", "tensor")
    assert (own.a.sharding.spec, own.b.sharding.spec) == (A, B)
    assert labels.a.out_sharding == (NAMES[names][0], None)
    assert labels.b.out_sharding == (None, NAMES[names][1])
    moments = [x for x in jax.tree.leaves(nnx.state(optimizer)) if x.ndim == 2]
    assert {x.sharding.spec for x in moments} == {A, B}
    assert np.all(np.isfinite(own.b))
