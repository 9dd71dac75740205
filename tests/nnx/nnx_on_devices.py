"""Modules of NNX on a mesh: A, B and their moments lie and are labeled like W."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from meshes import mesh_of
from small import some

import jlora

NAMES = {"logical": ("embed", "mlp"), "mesh": ("fsdp", "tensor")}
A, B = PartitionSpec("fsdp", None), PartitionSpec(None, "tensor")


class Words(nnx.Module):
    """A table and a dense layer, on a mesh."""

    def __init__(self) -> None:
        """Draws them."""
        rngs, draw = nnx.Rngs(0), nnx.initializers.lecun_normal()
        table = nnx.with_partitioning(draw, ("tensor", "fsdp"))
        kernel = nnx.with_partitioning(draw, ("fsdp", "tensor"))
        self.table = nnx.Embed(16, 128, rngs=rngs, embedding_init=table)
        self.up = nnx.Linear(128, 64, rngs=rngs, kernel_init=kernel)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """(length,) to (length, 64)."""
        return self.up(self.table(ids))


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_rows_and_codes_on_a_mesh(quantized: bool) -> None:
    """A step on eight devices is one on a device; V lies as the table's columns do."""
    ids, found = jnp.arange(8), []
    for shape in ((1, 1), (4, 2)):
        with jax.set_mesh(mesh_of(shape=shape)):
            model = nnx.jit(Words)()
            if quantized:
                graph, params, rest = nnx.split(model, nnx.Param, ...)
                params = jlora.quantize(params, jlora.NF4("up/kernel", block=32))
                model = nnx.merge(graph, params, rest)
                assert isinstance(model.up.kernel.get_value(), jlora.Quantized)
            rules = jlora.Rows("table/embedding", range(3, 6)), jlora.LoRA("up/kernel", rank=2)
            adapted = jlora.nnx.adapt(model, *rules, rngs=nnx.Rngs(1), example=(ids,))
            optimizer = nnx.Optimizer(adapted, optax.adam(0.1), wrt=nnx.LoRAParam)

            @nnx.jit(graph=False)
            def step(model: nnx.Module, optimizer: nnx.Optimizer, ids: jax.Array) -> None:
                trained = nnx.DiffState(0, nnx.LoRAParam)
                loss = lambda model: (model(ids) ** 2).sum()  # noqa: E731
                optimizer.update(model, nnx.grad(loss, argnums=trained)(model))

            step(adapted, optimizer, ids)
            found.append(np.asarray(adapted(ids)))
    np.testing.assert_allclose(*found, rtol=0, atol=1e-4)
    assert adapted.adapter["table"]["embedding"].v.sharding.spec == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize("names", some(NAMES, "logical"))
def test_an_adapter_lies_like_its_base(names: str) -> None:
    """By metadata of logical axes or of the mesh's; the step leaves A and B where they were."""
    start = nnx.with_partitioning(nnx.initializers.lecun_normal(), NAMES[names])
    x = jnp.ones((8, 16))
    with jax.set_mesh(mesh_of()), nnx.logical_axis_rules([("embed", "fsdp"), ("mlp", "tensor")]):
        model = nnx.Linear(16, 8, rngs=nnx.Rngs(0), kernel_init=start)
        adapted = jlora.nnx.adapt(model, jlora.LoRA(rank=2), rngs=nnx.Rngs(1), example=(x,))
        optimizer = nnx.Optimizer(adapted, optax.adam(0.1), wrt=nnx.LoRAParam)
        merged = adapted.merge()

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
