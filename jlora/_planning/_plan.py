"""`plan` computes the bytes that a training step needs on each device."""

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import ArrayLike

from .. import sharding
from .._arrays import AnyArray, AnyMesh, abstract
from .._errors import InputError
from .._text import align_columns, format_bytes
from .._tree import refuse_module
from .._types import PyTree, short
from ._mesh import CHIPS, check_places, is_replicated, is_unconstrained, mesh_of_leaves
from ._options import missing_options

if TYPE_CHECKING:
    import optax


class Plan(NamedTuple):
    """Bytes on one device during a training step; `print` shows a table.

    Attributes:
        devices: the number of devices.
        device: the kind of device, or None if it is not known.
        mesh: the axes of the mesh and their lengths.
        base: bytes of the frozen parameters.
        adapter: bytes of the trainable parameters.
        moments: bytes of the optimizer's state.
        batch: bytes of the loss function's other arguments.
        gradients: bytes of the adapter's gradients.
        activations: all other bytes that XLA allocates; None if the step was not compiled.
        peak: the sum of all these; None if the step was not compiled.
        capacity: bytes that a device has, or None if it is not known.
        program: the compiled step `(adapter, state, base, args) -> (adapter, state, loss)`, with
            its HLO, if it was compiled and fits, else None.
        replicated: whether there are several devices and each holds the whole base.
        unconstrained: whether the step was compiled for a mesh of several devices, but nothing in
            `loss` constrains how activations are sharded. XLA may then shard them as A and B are,
            and move and hold more: plan the step with constraints too.
        missing_options: names of the options that `compiler_options` returns on a TPU and that the
            step was compiled without.
    """

    devices: int
    device: str | None
    mesh: dict[str, int]
    base: int
    adapter: int
    moments: int
    batch: int
    gradients: int
    activations: int | None
    peak: int | None
    capacity: int | None
    program: jax.stages.Compiled | None = None
    replicated: bool = False
    unconstrained: bool = False
    missing_options: tuple[str, ...] = ()

    @property
    def exact(self) -> int:
        """The sum of everything but the activations, which follows from shapes."""
        return self.base + self.adapter + self.moments + self.batch + self.gradients

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the capacity; None if that is not known."""
        if self.capacity is None:
            return None
        if self.peak is None:
            return False if self.exact > self.capacity else None
        return self.peak <= self.capacity

    def __str__(self) -> str:
        everywhere = ", all of it on every device" if self.replicated else ""
        rows = [
            ("base (frozen)", self.base, "exact" + everywhere),
            ("adapter (trainable)", self.adapter, "exact"),
            ("moments", self.moments, "exact"),
            ("batch", self.batch, "exact"),
            ("gradients", self.gradients, "exact"),
        ]
        if self.activations is None or self.peak is None:
            rows += [("sum without activations", self.exact, "exact")]
        else:
            how = "compiled" + (", nothing constrains their shardings" * self.unconstrained)
            rows += [("activations", self.activations, how), ("peak", self.peak, "compiled")]
        axes = " × ".join(f"{name}={size}" for name, size in self.mesh.items())
        where = f"{self.devices} × {self.device or 'device'}" + (f", {axes}" if axes else "")
        cells = [(name, format_bytes(size), how) for name, size, how in rows]
        lines = align_columns((where, "a device", ""), cells, {"a device"})
        lines.append(self._verdict())
        if self.missing_options:
            lines.append(
                f"compiled without {', '.join(self.missing_options)}, with which the step moves "
                "fewer bytes: give jax.jit compiler_options=jlora.compiler_options()"
            )
        return "\n".join(lines)

    def _verdict(self) -> str:
        if self.capacity is None:
            return "the capacity of a device is not known"
        capacity = format_bytes(self.capacity)
        if self.fits is None:
            return (
                f"leaves {format_bytes(self.capacity - self.exact)} of {capacity} for activations"
            )
        return f"{'fits' if self.fits else 'does not fit'} in {capacity}"


def plan(
    loss: Callable[..., Any],
    base: PyTree,
    adapter: PyTree,
    args: Sequence[Any] = (),
    tx: "optax.GradientTransformation | None" = None,
    *,
    capacity: int | None = None,
    compile: bool | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> Plan:
    r"""Computes the bytes that a training step needs on each device, without running it.

    The step computes the gradient $\nabla_{adapter}\,\mathrm{loss}(adapter, base, \ldots)$, its
    update by `tx`, and the new adapter. It donates the old adapter and the optimizer's state.

    If the arguments are sharded over a mesh of devices, the step is compiled for them. You can use
    the devices of a TPU slice that you do not have, from
    `jax.experimental.topologies.get_topology_desc`; this needs `pip install "jax[tpu]"`. On an
    `AbstractMesh`, or with `compile=False`, the plan has everything but the activations.

    Args:
        loss: a function `(adapter, base, *args)` that returns a scalar.
        base: the frozen tree, of arrays or `jax.ShapeDtypeStruct`s with shardings. Give the
            parameters that you gave to `init`, not the `base` that `jax.eval_shape` returns: it
            drops shardings along automatic mesh axes. Arrays on no mesh are replicated, as by
            `jax.jit`.
        adapter: the trainable tree, likewise. If it has no shardings, it gets those of
            `sharding.specs`. For full fine-tuning give the parameters here, and an empty tree as
            `base`.
        args: the loss function's other arguments, likewise, as a tuple.
        tx: an optax transformation; by default AdamW.
        capacity: bytes of a device; by default the number that TPUs of its kind have, or that JAX
            reports.
        compile: whether to compile the step; by default it is compiled if possible. True raises if
            it is not possible.
        compiler_options: as for `jax.stages.Lowered.compile`; give those that you give `jax.jit`,
            such as `compiler_options()`.

    Returns:
        A `Plan`. If the step does not fit, its peak is the number in the compiler's error.

    Raises:
        TypeError: if `args` is not a tuple; if `base` or `adapter` is a module from `jlora.nnx` or
            `jlora.keras`.
        ValueError: if `compile` is True and the mesh is an `AbstractMesh`, or a
            `jax.ShapeDtypeStruct` has no sharding on a mesh of several devices.

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
        >>> found.base, found.adapter, found.moments, found.gradients  # an eighth of A, all of B
        (32768, 2304, 4612, 2304)
        >>> print(found)
        8 × device, fsdp=8       a device
        base (frozen)            32.0 KiB  exact
        adapter (trainable)       2.2 KiB  exact
        moments                   4.5 KiB  exact
        batch                     8.0 KiB  exact
        gradients                 2.2 KiB  exact
        sum without activations  49.0 KiB  exact
        the capacity of a device is not known
    """
    import optax

    if not isinstance(args, tuple | list):
        raise TypeError(
            "`args` must be the tuple of the loss function's other arguments; got "
            f"{_describe(args)}. Write plan(loss, base, adapter, (x,))."
        )
    for x, argument in ((base, "base"), (adapter, "adapter")):
        refuse_module(x, argument)
    mesh = mesh_of_leaves(base, adapter, args)
    check_places(mesh, base, adapter, args)
    is_abstract = isinstance(mesh, AbstractMesh)
    if compile and is_abstract:
        raise InputError(
            "compile",
            "needs a mesh of devices, but the shardings are on an AbstractMesh. Make a "
            "mesh of devices; jax.experimental.topologies.get_topology_desc has those of TPU "
            "slices that you do not have.",
        )
    tx = optax.adamw(1e-4) if tx is None else tx
    operands = _operands(mesh, base, adapter, args, tx)
    base = operands[2]
    of_adapter, of_state, of_base, of_args = (
        sum(map(_shard_size, jax.tree.leaves(x))) for x in operands
    )
    exact = (of_base, of_adapter, of_state, of_args, of_adapter)
    device = _device(mesh)
    capacity = _capacity(device) if capacity is None else capacity
    peak, program, unconstrained = None, None, False
    missing: tuple[str, ...] = ()
    step = _step(loss, tx)
    if compile is False or is_abstract:
        jax.eval_shape(step, *operands)  # so that errors of the loss are raised
    else:
        traced = _trace(step, operands)
        unconstrained = is_unconstrained(mesh, traced.jaxpr, operands[0], base)
        peak, capacity, program = _compile(traced, compiler_options, capacity)
        missing = missing_options(device.platform, compiler_options or {})
    axes = {} if mesh is None else dict(mesh.shape)
    count = 1 if mesh is None else mesh.size
    kind = getattr(device, "device_kind", None)
    # At least 0: a compiled step need not hold all gradients at once.
    activations = None if peak is None else max(0, peak - sum(exact))
    numbers = (*exact, activations, peak, capacity)
    flags = (is_replicated(count, base), unconstrained, missing)
    return Plan(count, kind, axes, *numbers, program, *flags)


def _describe(x: object) -> str:
    return short(x) if hasattr(x, "dtype") else f"an object of type {type(x).__name__}"


def _operands(
    mesh: AnyMesh | None,
    base: PyTree,
    adapter: PyTree,
    args: Sequence[Any],
    tx: "optax.GradientTransformation",
) -> tuple[Any, ...]:
    """Returns adapter, optimizer state, base and arguments as shapes with shardings."""
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    def shape(x: AnyArray | ArrayLike, place: Sharding | None = None) -> jax.ShapeDtypeStruct:
        x = x if isinstance(x, AnyArray) else jnp.asarray(x)
        own = getattr(x, "sharding", None)
        own = own if isinstance(own, NamedSharding) else place or whole
        return abstract(x).update(sharding=own)

    base, args = jax.tree.map(shape, (base, tuple(args)))
    if mesh is not None and mesh_of_leaves(adapter) is None:
        adapter = jax.tree.map(shape, adapter, sharding.specs(base, adapter))
    adapter = jax.tree.map(shape, adapter)
    state = jax.eval_shape(tx.init, adapter)
    if mesh is not None:
        places = jax.tree.map(lambda x: x.sharding, adapter)
        state = jax.tree.map(shape, state, sharding.moments(state, adapter, places))
    return adapter, state, base, args


def _step(loss: Callable[..., Any], tx: "optax.GradientTransformation") -> Callable[..., Any]:
    import optax

    def step(adapter: PyTree, state: PyTree, base: PyTree, args: Sequence[Any]) -> Any:
        value, gradient = jax.value_and_grad(loss)(adapter, base, *args)
        updates, state = tx.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    return step


def _device(mesh: AnyMesh | None) -> Any:
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


# "… memory required for HLO temporaries (46.85G) exceeds available HBM (15.75G)": in GiB, and the
# first number includes the arguments.
NEEDED = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available \w+ \(([\d.]+)([KMGT])\)")


def _trace(step: Callable[..., Any], operands: tuple[Any, ...]) -> jax.stages.Traced:
    adapter, state = (jax.tree.map(lambda x: x.sharding, tree) for tree in operands[:2])
    places = (adapter, state, None)
    program = jax.jit(step, donate_argnums=(0, 1), out_shardings=places, keep_unused=True)
    return program.trace(*operands)


def _compile(
    traced: jax.stages.Traced,
    options: dict[str, Any] | None,
    capacity: int | None,
) -> tuple[int | None, int | None, jax.stages.Compiled | None]:
    """Returns the peak of the compiled step if known, the capacity of a device, and the program."""
    from .._progress import progress  # not at the import of jlora

    try:
        with progress(total=1, desc="compile", leave=False):
            compiled = traced.lower().compile(compiler_options=options)
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


def _shard_size(x: jax.ShapeDtypeStruct) -> int:
    """Counts the bytes of an array on one device."""
    shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    return math.prod(shape) * x.dtype.itemsize
