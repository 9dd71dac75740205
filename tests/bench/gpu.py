"""Kernels and bytes of a layer's step, as XLA compiles it for an H100 that is not there.

    pip install --no-deps --target build/cuda jax-cuda12-{plugin,pjrt}==VERSION_OF_JAX
    JAX_PLATFORMS=cpu PYTHONPATH=build/cuda python -m tests.bench gpu

The layer and its steps are those of `tpu`. Bytes are the operands and the results of kernels; XLA
counts neither bytes nor operations for a GPU. On a real one it times, product by product, a kernel
of its own (Triton), which can have sums and elementwise operations in it, against one of cuBLAS,
which can add one array to its product. Without one it takes Triton throughout, or cuBLAS where it
is told so; a real step lies between the two.
"""

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pod_plan
from home import flash
from jax.sharding import NamedSharding, PartitionSpec

import jlora
from jlora._progress import progress

from . import h100, report, tpu, traffic
from .peers import llama_work

KERNELS = {"Triton": {}, "cuBLAS": {"xla_gpu_enable_triton_gemm": False}}
FORMS = {
    "floor": ("floor",),
    "q, v": ("jlora", 16, r"[qv]"),
    "all-linear": ("jlora", 16),
    "by hand": ("plain", 16),
    "full": ("full",),
}


class Cost(NamedTuple):
    """What a step of one layer runs.

    Attributes:
        size: operands and results of its kernels, in bytes.
        kernels: how many there are.
        passes: those that are no products, and read or write an activation (tokens, d).
    """

    size: int
    kernels: int
    passes: int


def run(quick: bool) -> None:
    """A row for each attention, kind of kernels and choice of what is trained."""
    if not has_compiler():
        raise SystemExit(
            "The compiler for GPUs is missing: pip install --no-deps jax-cuda12-plugin "
            "jax-cuda12-pjrt, of JAX's version."
        )
    shapes = {"small": SMALL} if quick else {"XLA's attention": LAYER, "a flash attention": FLASH}
    rows = []
    for name, shape in shapes.items():
        for kernels in KERNELS:
            costs = {
                form: step(shape, kernels, *args)
                for form, args in progress(FORMS.items(), f"{name}, {kernels}")
            }
            rows += [
                {"layer": name, "products": kernels, "trained": form}
                | {"GB": cost.size / 1e9, "bytes": cost.size / costs["floor"].size}
                | {"kernels": cost.kernels, "passes": cost.passes}
                for form, cost in costs.items()
            ]
    report.table("gpu: operands and results of kernels, over the frozen step's", rows)
    report.table("gpu: memory of a step of `h100`, planned", list(memory(quick)))


def memory(quick: bool) -> Iterator[dict[str, Any]]:
    """The GB of whole steps of Llama 3 8B, for what they keep for the backward pass."""
    work = llama_work.QUICK if quick else llama_work.LLAMA
    mesh = pod_plan.mesh_of("cuda:1x1x1", (1, 1))

    def place(tree: Any) -> Any:
        everywhere = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree
        )

    key, ids = jax.random.key(0), jax.ShapeDtypeStruct((work.batch, work.length + 1), jnp.int32)
    params = place(jax.eval_shape(functools.partial(h100.start, work), key))
    for kept, how in h100.KEPT.items():
        shape = h100.shape_of(work)._replace(**how, attention=rotated_flash)
        apply = functools.partial(h100.model, shape)
        for trained, rule in {"floor": jlora.Full("w/norm.*"), "jlora": h100.LORA}.items():
            lora = jlora.transform(apply, rule)
            base, adapter = jax.eval_shape(lora.init, key, params, ids)

            def loss(adapter: Any, base: Any, ids: Any, lora: Any = lora) -> jax.Array:
                return -lora.apply(base, adapter, ids).mean()

            with pallas_for(mesh):
                found = jlora.plan(
                    loss, place(base), place(adapter), (place(ids),), optax.adamw(1e-4)
                )
            sizes = {"base": found.base, "kept and temporary": found.activations}
            yield {"kept": kept, "trained": trained} | {
                f"{name} GB": size / 1e9 for name, size in [*sizes.items(), ("peak", found.peak)]
            }


def step(shape: tpu.Layer, kernels: str, *trained: Any) -> Cost:
    """The cost of a step in which `trained` is as for `tpu.compile_step`."""
    mesh = pod_plan.mesh_of("cuda:1x1x1", (1, 1))
    with pallas_for(mesh):
        program = tpu.compile_step(shape, mesh, *trained, options=KERNELS[kernels])
    found = traffic.kernels(program.as_text())
    activation = 2 * shape.batch * shape.length * shape.dim
    passes = sum(not kernel.multiplies and kernel.size >= activation for kernel in found)
    return Cost(sum(kernel.size for kernel in found), len(found), passes)


def has_compiler() -> bool:
    """Whether its plugin is installed; no GPU, driver or other library is needed."""
    return importlib.util.find_spec("jax_cuda12_plugin") is not None


# ---------------------------------------------------------------------------------- the attention


@contextlib.contextmanager
def pallas_for(mesh: Any) -> Iterator[None]:
    """Tells kernels of Pallas which device they are for."""
    with warnings.catch_warnings(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        # No others of Pallas compile without a GPU.
        warnings.filterwarnings("ignore", ".*Triton backend is deprecated", DeprecationWarning)
        yield


def rotated_flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """With the rotations of `h100`."""
    return flash(*h100.rotate(q, k), v)


LAYER = tpu.SHAPES["grouped queries"]._replace(length=4096)  # 2 × 4,096 tokens of Llama 3 8B
FLASH = LAYER._replace(attention=flash)
SMALL = tpu.SMALL._replace(groups=2, attention=flash)
