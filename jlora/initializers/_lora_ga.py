"""LoRA-GA."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..core import RANK, Axis, Change, Delta, Factor
from ._draw import dtype_of
from ._sketched import check_kind, spectrum

GAMMA = 16.0


def lora_ga(sketch: Any, gamma: float = GAMMA) -> Callable[..., tuple[Any, Any, Any]]:
    r"""A and B along the gradient, so that the first step is near that of full fine-tuning.

    Of the gradient $G = \sum_i \sigma_i u_i v_i^T$ of W, with n outputs, and the rank r,

    $$A = [u_1 \ldots u_r],\quad
    B = \frac{n^{1/4}}{\sqrt\gamma}\, [\sigma_{r+1} v_{r+1} \ldots \sigma_{2r} v_{2r}]^T,$$

    and the base becomes $W - s A B$, so that the adapted model begins as the model was. Singular
    values that a small W has not are zero. Once trained, `arithmetic.difference(adapter, initial)`
    is the adapter of the parameters, of twice the rank, as PEFT and engines need it.

    Args:
        sketch: from `jlora.sketch` with `kind="gradient"`, of the same rules and 2·r components.
        gamma: the number under the root, positive.

    Returns:
        An initializer. It raises `ValueError` of a site that the sketch has not, or has with
        another shape, or with fewer than 2·r components, and where W is quantized.

    Source: Wang et al., arXiv 2407.05000, in the form that PEFT has by default, `direction` ArB2r
    and `scale` stable.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params, batches = {"w": jnp.ones((4, 3))}, [jnp.eye(4)]
        >>> loss = lambda params, x: jnp.sum((x @ params["w"] - x[:, :3]) ** 2)
        >>> found = jlora.sketch(loss, params, jlora.LoRA("w", rank=1), batches, kind="gradient")
        >>> rule = jlora.LoRA("w", rank=1, init=jlora.initializers.lora_ga(found))
        >>> lora = jlora.transform(lambda params, x: x @ params["w"], rule)
        >>> base, adapter = lora.init(jax.random.key(0), params, batches[0])
        >>> bool(jnp.allclose(lora.apply(base, adapter, batches[0]), 1, atol=1e-5))
        True
    """
    check_kind(sketch, "gradient", "lora_ga")
    if not gamma > 0:
        raise ValueError(f"`gamma` of lora_ga must be positive; got {gamma!r}.")

    def start(key: jax.Array, w: Any, site: Any, rule: Any) -> tuple[Any, Any, Any]:
        del key
        if hasattr(w, "packed"):
            raise ValueError(
                f"lora_ga changes W of {site.path!r}, which is quantized. Call init with W as it "
                "was, then jlora.quantize the base."
            )
        r, dtype = rule.rank, dtype_of(site, rule)
        found = spectrum(sketch, site, rule, 2 * r)
        before = found.values.ndim - 1  # the stack and the slots
        a = jnp.array(found.inputs[..., :r], dtype)
        b = found.outputs[(slice(None),) * before + (slice(r, 2 * r),)]
        outputs = math.prod(b.shape[before + 1 :])
        values = found.values[..., r : 2 * r] * (outputs**0.25 / math.sqrt(gamma))
        b = b * values.reshape(*values.shape, *[1] * (b.ndim - before - 1))
        missing = [(0, r - n if d == before else 0) for d, n in enumerate(b.shape)]
        b = jnp.pad(b, missing).astype(dtype)
        return _minus(w, a, b, rule.scale, site.layout), a, b

    return start


def _minus(w: Any, a: jax.Array, b: jax.Array, scale: float, layout: Any) -> Any:
    """W - s·A·B, rounded once; W itself where it is a shape alone."""
    if isinstance(w, jax.ShapeDtypeStruct):
        return w
    stack, inputs, outputs, slots = layout
    of_a, of_b = (
        tuple(RANK if d is None else Axis(d) for d in axes)
        for axes in ((*stack, *inputs, None), (*stack, None, *outputs))
    )
    parts = [(a, b)]
    if slots is not None:
        count, chosen, axis = slots
        n, length = len(stack), w.shape[axis] // count

        def placed(b: jax.Array, slot: int) -> jax.Array:
            """B of one slot for all outputs."""
            around = [(0, 0)] * b.ndim
            around[n + 1 + outputs.index(axis)] = (slot * length, (count - 1 - slot) * length)
            return jnp.pad(b, around)

        parts = [
            (jnp.take(a, i, n), placed(jnp.take(b, i, n), slot)) for i, slot in enumerate(chosen)
        ]
    deltas = tuple(Delta(Factor(a, of_a), Factor(b, of_b), scale) for a, b in parts)
    return Change(deltas).of(w, tuple(map(Axis, range(w.ndim))), sign=-1)
