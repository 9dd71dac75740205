"""What a training step needs on each device, before a job is submitted."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from .. import sharding
from .._table import aligned, readable
from .._types import PyTree
from ._estimate import held, layout_of
from ._placed import check_places, is_replicated, mesh_of_leaves
from ._topology import CHIPS


class Plan(NamedTuple):
    """Bytes that one device holds during a training step; `str()` is a table.

    Attributes:
        method: `"compiled"` or `"arithmetic"`: where `activations` and `peak` come from. All other
            numbers are exact in both.
        devices: how many there are.
        device: their kind, if known.
        mesh: the axes of the mesh and their lengths.
        base: the frozen parameters.
        adapter: the trainable ones.
        moments: the optimizer's state.
        batch: the loss function's other arguments.
        gradients: those of the adapter.
        activations: all else that the step holds at its peak. Compiled: what XLA allocates beyond
            the above. By arithmetic: an estimate from what the traced step holds at once, with
            elementwise operations fused; for GPT-3 and Llama on TPUs the peak is within 15% of the
            compiled one.
        peak: the sum.
        capacity: what a device has, if known.
        program: the compiled step `(adapter, state, base, args) -> (adapter, state, loss)`, with
            its HLO, if it was compiled and fits.
        replicated: whether every one of several devices holds the whole base.
    """

    method: str
    devices: int
    device: str | None
    mesh: dict[str, int]
    base: int
    adapter: int
    moments: int
    batch: int
    gradients: int
    activations: int
    peak: int
    capacity: int | None
    program: jax.stages.Compiled | None = None
    replicated: bool = False

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the capacity; None where that is unknown."""
        return None if self.capacity is None else self.peak <= self.capacity

    def __str__(self) -> str:
        estimated = "compiled" if self.method == "compiled" else "estimate"
        names = {"base": "base (frozen)", "adapter": "adapter (trainable)"}
        notes = {"base": ", all of it on every device"} if self.replicated else {}
        rows = [
            (names.get(name, name), readable(getattr(self, name)), how + notes.get(name, ""))
            for name, how in [
                *((n, "exact") for n in ("base", "adapter", "moments", "batch", "gradients")),
                ("activations", estimated),
                ("peak", estimated),
            ]
        ]
        axes = " × ".join(f"{name}={size}" for name, size in self.mesh.items())
        where = f"{self.devices} × {self.device or 'device'}" + (f", {axes}" if axes else "")
        lines = aligned((where, "a device", ""), rows, {"a device"})
        return "\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        if self.capacity is None:
            return "what a device has is not known"
        return f"{'fits' if self.fits else 'does not fit'} in {readable(self.capacity)}"


def plan(
    loss: Callable[..., Any],
    base: PyTree,
    adapter: PyTree,
    args: Sequence[Any] = (),
    tx: optax.GradientTransformation | None = None,
    *,
    capacity: int | None = None,
    compile: bool | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> Plan:
    r"""What a training step needs on each device, without running it.

    The step is $g = \nabla_{adapter}\,\mathrm{loss}(adapter, base, \ldots)$, an update by `tx`, and
    the sum, with the adapter and the optimizer's state donated. Where the shardings are of devices,
    also those of a TPU slice from `jax.experimental.topologies.get_topology_desc`, it is compiled
    for them; on an `AbstractMesh`, or with `compile=False`, its needs are computed from shapes.

    Args:
        loss: a function `(adapter, base, *args)` to a scalar.
        base: the frozen tree, as arrays or `jax.ShapeDtypeStruct`s with shardings. Give the
            parameters that `init` was given: along automatic mesh axes `jax.eval_shape` drops the
            shardings of the `base` that it returns. Arrays that are on no mesh are replicated, as
            `jax.jit` does with them.
        adapter: the trainable tree, likewise. Without shardings it is sharded as `sharding.specs`
            says. A plain tree of parameters is full fine-tuning, with `base` as an empty tree.
        args: the loss function's other arguments, likewise.
        tx: an optax transformation; AdamW by default.
        capacity: bytes that a device has; known for TPUs and where a device says it.
        compile: True to insist on it, False to do without.
        compiler_options: as for `jax.stages.Lowered.compile`.

    Returns:
        A `Plan`. If the compiler finds that the step does not fit, the peak is what it needs.

    Raises:
        ValueError: if `compile` is True and the shardings are of an `AbstractMesh`; or if, on a
            mesh of several devices, a `jax.ShapeDtypeStruct` has no sharding.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P
        >>> mesh = AbstractMesh((8,), ("fsdp",), (AxisType.Auto,))
        >>> by_rows = NamedSharding(mesh, P("fsdp"))
        >>> params = {"w": jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=by_rows)}
        >>> x = jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=by_rows)
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=2))
        >>> _, adapter = jax.eval_shape(lora.init, jax.random.key(0), params, x)
        >>> loss = lambda adapter, base, x: lora.apply(base, adapter, x).mean()
        >>> found = jlora.plan(loss, params, adapter, (x,))
        >>> found.base, found.adapter, found.moments, found.gradients  # of A an eighth, B whole
        (32768, 2304, 4612, 2304)
    """
    mesh = mesh_of_leaves(base, adapter, args)
    check_places(mesh, base, adapter, args)
    abstract = isinstance(mesh, AbstractMesh)
    if compile and abstract:
        raise ValueError(
            "`compile` needs shardings of devices; those of `base` are of an AbstractMesh. Make "
            "the mesh of devices, also of a TPU slice that is not there: "
            "jax.experimental.topologies.get_topology_desc."
        )
    tx = optax.adamw(1e-4) if tx is None else tx
    operands = _operands(mesh, base, adapter, args, tx)
    adapter, _, base, args = operands
    exact = [sum(map(_shard_size, jax.tree.leaves(x))) for x in operands]
    of_adapter, of_state, of_base, of_args = exact
    fixed = (of_base, of_adapter, of_state, of_args, of_adapter)
    device = _device(mesh)
    capacity = _capacity(device) if capacity is None else capacity
    method, peak, program = "compiled", None, None
    if compile is not False and not abstract:
        peak, capacity, program = _compile(_step(loss, tx), operands, compiler_options, capacity)
    if peak is None:
        method, peak = "arithmetic", sum(exact) + _estimate(loss, adapter, base, args, mesh)
    axes = {} if mesh is None else dict(mesh.shape)
    count = 1 if mesh is None else mesh.size
    kind = getattr(device, "device_kind", None)
    # Compiled, not all gradients need exist at once.
    activations = max(0, peak - sum(fixed))
    numbers = (*fixed, activations, peak, capacity)
    return Plan(method, count, kind, axes, *numbers, program, is_replicated(count, base))


def _operands(mesh: Any, base: PyTree, adapter: PyTree, args: Any, tx: Any) -> tuple[Any, ...]:
    """Adapter, optimizer state, base and arguments as shapes with shardings."""
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    def shape(x: Any, place: Any = None) -> jax.ShapeDtypeStruct:
        x = x if hasattr(x, "dtype") else jnp.asarray(x)
        own = getattr(x, "sharding", None)
        own = own if isinstance(own, NamedSharding) else place or whole
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own)

    base, args = jax.tree.map(shape, (base, tuple(args)))
    if mesh is not None and mesh_of_leaves(adapter) is None:
        adapter = jax.tree.map(shape, adapter, sharding.specs(base, adapter))
    adapter = jax.tree.map(shape, adapter)
    state = jax.eval_shape(tx.init, adapter)
    if mesh is not None:
        places = jax.tree.map(lambda x: x.sharding, adapter)
        state = jax.tree.map(shape, state, sharding.moments(state, adapter, places))
    return adapter, state, base, args


def _step(loss: Callable[..., Any], tx: optax.GradientTransformation) -> Callable[..., Any]:
    def step(adapter: PyTree, state: PyTree, base: PyTree, args: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(adapter, base, *args)
        updates, state = tx.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    return step


def _device(mesh: Any) -> Any:
    if mesh is None:
        return jax.devices()[0]
    return None if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0]


def _capacity(device: Any) -> int | None:
    for chip in CHIPS.values():
        if chip.kind == getattr(device, "device_kind", None):
            return chip.capacity
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except (AttributeError, jax.errors.JaxRuntimeError):  # a device of a topology has no memory
        return None


# --------------------------------------------------------------------------------------- compiled

# "… memory required for HLO temporaries (46.85G) exceeds available HBM (15.75G)": all of it, the
# arguments too, in GiB.
NEEDED = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available \w+ \(([\d.]+)([KMGT])\)")


def _compile(
    step: Any, operands: tuple[Any, ...], options: dict[str, Any] | None, capacity: int | None
) -> tuple[int | None, int | None, jax.stages.Compiled | None]:
    """The bytes that the compiled step holds, if known, what a device has, and the program."""
    adapter, state = (jax.tree.map(lambda x: x.sharding, tree) for tree in operands[:2])
    places = (adapter, state, None)
    program = jax.jit(step, donate_argnums=(0, 1), out_shardings=places, keep_unused=True)
    try:
        compiled = program.lower(*operands).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as e:
        found = NEEDED.search(str(e))
        if "RESOURCE_EXHAUSTED" not in str(e) or found is None:
            raise
        return _bytes(*found.group(1, 2)), _bytes(*found.group(3, 4)), None
    used = compiled.memory_analysis()
    if used is None:
        return None, capacity, compiled
    peak = used.argument_size_in_bytes + used.temp_size_in_bytes + used.generated_code_size_in_bytes
    peak += used.output_size_in_bytes - used.alias_size_in_bytes
    return peak, capacity, compiled


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** (1 + "KMGT".index(unit)))


# ------------------------------------------------------------------------------------- arithmetic


# Beside what a step holds XLA allocates gaps, and copies in other layouts: in the middle of five
# steps of GPT-3 and Llama on TPUs and GPUs so much more.
ALLOCATED = 1.25


def _estimate(loss: Callable[..., Any], adapter: PyTree, base: PyTree, args: Any, mesh: Any) -> int:
    """What XLA allocates for the traced gradient."""
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(adapter, base, *args)
    leaves = jax.tree.leaves((adapter, base, args))
    layouts = [layout_of(x.sharding.spec if x.sharding else (), x.ndim) for x in leaves]
    return int(ALLOCATED * held(jaxpr, layouts, {} if mesh is None else dict(mesh.shape))[0])


def _shard_size(x: jax.ShapeDtypeStruct) -> int:
    """The bytes of an array on one device."""
    shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    return math.prod(shape) * x.dtype.itemsize
