"""`merge` adds ΔW to W, for export and serving; `unmerge` subtracts it again."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from ._adapters import Node, arrays, state
from ._arrays import back, count_not_finite, to_device
from ._compat import is_concrete, place_of
from ._core import Axis
from ._errors import InputError, Problem, stop
from ._node import BoundLeaf, PartialWeightError, lower
from ._quantized import BaseLeaf, Quantized, dequantize, is_quantized, quantize_weight
from ._tree import bind, flatten, is_adapted, leaves_by_path, name_of
from ._types import Path, PyTree


def merge(
    base: PyTree, adapter: PyTree, *, check: bool = False, requantize: bool = False
) -> PyTree:
    r"""Merges an adapter into its base: $W' = W + s \cdot A B$.

    The sum is computed in float32 (in float64 if W is float64) and rounded once to W's dtype.
    Leaves trained in full replace those of the base. All other leaves are the arrays of the base.
    Quantized weights, adapted or not, become plain arrays of W's full size: ΔW is added to their
    values in float32. With `requantize` they stay as small as they are.

    Call it eagerly if memory is short: it then forms one ΔW at a time, and none at ranks up to 16.
    To update the base in place, call `jax.jit(jlora.merge, donate_argnums=0)`. On CPUs XLA then
    forms every ΔW of a higher rank at once, unless the environment variable `XLA_FLAGS` has
    `--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED`.

    Give merged parameters to the model itself, or to `apply` with the adapter `{}`. jlora cannot
    tell them from a base: `apply(merge(base, adapter), adapter, ...)` would count ΔW twice.

    Args:
        base: the frozen tree.
        adapter: the adapter. Its dropout keys are ignored. With `{}` it changes no value.
        check: whether to raise if a merged leaf is not finite. This needs concrete values, so it
            does not work under `jit`.
        requantize: whether to quantize trained weights again, each in its own scheme, and keep the
            other quantized weights. This rounds ΔW to a few bits, which may undo the training;
            `print(jlora.summary(merged))` lists the error of each leaf.

    Returns:
        A tree with the structure, shapes, dtypes and shardings of `base`. A merged leaf is strongly
        typed, even if W is weakly typed, as `jnp.full(shape, 1.0)` is.

    Raises:
        TypeError: if `adapter` is not an adapter.
        ValueError: if `adapter` does not fit `base`; with `check`, if values are not finite, or
            traced. The error names the paths.
        NotImplementedError: in a `shard_map` that may shard a weight which `DoRA`, `Rows` or
            slots need whole.

    Source: Hu et al., arXiv 2106.09685, section 4.1 (no additional inference latency).

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((4, 3), jnp.bfloat16)}
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=2))
        >>> base, adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 4), jnp.bfloat16))
        >>> jlora.merge(base, adapter)["w"].dtype.name
        'bfloat16'
        >>> base = jlora.quantize({"w": jnp.ones((64, 64))}, jlora.NF4("w"))
        >>> base["w"].nbytes, jlora.merge(base, {})["w"].nbytes
        (2120, 16384)
    """
    return _combine(base, adapter, 1, check, requantize)


def unmerge(params: PyTree, adapter: PyTree) -> PyTree:
    r"""Recovers the base of merged parameters: $W = W' - s \cdot A B$, up to rounding.

    Leaves trained in full keep the values of `params`: `apply` reads them from the adapter anyway.

    Args:
        params: merged parameters.
        adapter: the adapter that was merged.

    Returns:
        A tree with the structure, shapes, dtypes and shardings of `params`.

    Raises:
        TypeError: if `adapter` is not an adapter.
        ValueError: if `adapter` does not fit `params`, an adapted weight is quantized, or W cannot
            be computed from W', as with `DoRA` and `Rows`.
        NotImplementedError: as in `merge`.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((4, 3))}
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=2))
        >>> base, adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 4)))
        >>> bool((jlora.unmerge(jlora.merge(base, adapter), adapter)["w"] == params["w"]).all())
        True
    """
    return _combine(params, adapter, -1)


def _combine(
    base: PyTree, adapter: PyTree, sign: int, check: bool = False, requantize: bool = False
) -> PyTree:
    bound = leaves_by_path(bind(base, adapter), is_adapted)
    old_leaves, tree = flatten(base)
    leaves = []
    wrong = []
    for (path, x), old in zip(bound, old_leaves, strict=True):
        to_codes = requantize and is_quantized(old)
        if is_adapted(x):
            x = _apply_change(x, name_of(path), sign)
        elif sign < 0:
            x = old
        elif x is not old or not to_codes:
            x = _cast_like(x, old)
        # Codes may not tell that a value is not finite.
        wrong += _find_not_finite(path, x) if check else []
        leaves.append(_quantize_like(x, old) if to_codes and x is not old else x)
    remedy = "The adapter or the base holds NaN or infinity there; use an earlier checkpoint."
    stop(wrong, "merge", "computed values that are not finite.", remedy)
    return jax.tree.unflatten(tree, leaves)


def _quantize_like(w: BaseLeaf, old: Quantized) -> Quantized:
    """Quantizes `w` with the scheme, form and sharding of `old`."""
    leaf = quantize_weight(jnp.asarray(w), old.scheme, old.form)
    if not is_concrete(leaf.data) or place_of(old.data) is None:
        return leaf
    place = jax.tree.map(lambda x: x.sharding, dataclasses.replace(old, error=None))
    moved = jax.device_put(dataclasses.replace(leaf, error=None), place)
    at = None if old.error is None else old.error.sharding
    return dataclasses.replace(moved, error=jax.device_put(leaf.error, at))


def _apply_change(leaf: BoundLeaf, path: str, sign: int) -> Any:
    if sign < 0 and (is_quantized(leaf.base) or not leaf.delta.is_invertible):
        why = "its change depends on the original weight"
        why = "it is quantized, and codes are rough" if is_quantized(leaf.base) else why
        name = type(leaf.delta).__name__
        raise InputError("unmerge", f"cannot undo {name} at {path!r}: {why}. Keep the base.")
    # One program, so that a sharded W stays on its devices. Leaves of one form share it.
    program = jax.jit(_change, static_argnums=2, out_shardings=_sharding_of(leaf.base))
    keys = arrays(leaf.delta).keys() - state(leaf.delta).keys()
    node = leaf.delta._replace(**dict.fromkeys(keys))
    try:
        return program(leaf.base, node, sign)
    except PartialWeightError as e:
        raise e.at(path) from None


def _change(w: jax.Array | Quantized, node: Node, sign: int) -> jax.Array:
    axes = [Axis(d) for d in range(w.ndim)]
    own, node = to_device((w, node))
    own = own.array(jnp.float32) if isinstance(own, Quantized) else own
    return back(lower(node, own).of(own, axes, sign).astype(w.dtype), w)


def _cast_like(w: BaseLeaf, old: BaseLeaf) -> BaseLeaf:
    if is_quantized(w):
        return dequantize(w)
    if w is old:
        return w
    w = jnp.asarray(w, jnp.result_type(old))
    place = _sharding_of(old)
    return back(w, old) if place is None else jax.device_put(w, place)


def _sharding_of(w: BaseLeaf) -> Sharding | None:
    """Returns the sharding that the user gave `w`, or None."""
    if is_quantized(w):
        return None if w.form.flat else _sharding_of(w.data)
    return place_of(w)


def _find_not_finite(path: Path, x: Any) -> list[Problem]:
    """Counts the values of a merged leaf that are not finite; empty if there are none."""
    if not all(map(is_concrete, jax.tree.leaves(x))):
        raise InputError(
            "check",
            "of merge needs concrete values, which jit, grad and vmap do not have. "
            "Merge without `check` there, and check the result outside.",
        )
    x = dequantize(x) if is_quantized(x) else x
    n = count_not_finite(x) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else 0
    return [Problem(name_of(path), f"{n} of {np.size(x)} values")] if n else []
