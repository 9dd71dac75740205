"""LoRA-GA: A and B from the gradient."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from .._quantized import BaseLeaf, Quantized
from .._rules import check_field, is_finite
from .._site import Site
from ._initializer import RankRule, SketchInitializer, Start, dtype_of
from ._split import split_of, subtract


@dataclasses.dataclass(frozen=True, repr=False)
class lora_ga(SketchInitializer):
    r"""Sets A and B to singular vectors of the gradient: the first step is like full fine-tuning's.

    For a W with gradient $G = \sum_i \sigma_i u_i v_i^T$ and n outputs, and the rank r,

    $$A = [u_1 \ldots u_r],\quad
    B = \frac{n^{1/4}}{\sqrt\gamma}\, [\sigma_{r+1} v_{r+1} \ldots \sigma_{2r} v_{2r}]^T,$$

    and the base becomes $W - s A B$, so that the adapted model starts as the original. Singular
    values that a small W lacks count as zero. For PEFT and serving, use
    `arithmetic.difference(adapter, initial)` after training: it is the adapter of the original
    parameters, with twice the rank.

    Args:
        sketch: from `jlora.sketch` with `kind="gradient"`, the same rules, and 2·r components.
        gamma: $\gamma$, a positive number.

    Raises:
        TypeError: if `sketch` is not a sketch.
        ValueError: if `sketch` is of another kind, or `gamma` is not positive and finite; in
            `init`, if the sketch lacks a site, is zero there, or has it with another shape or fewer
            than 2·r components, or W is quantized.

    Source: Wang et al., arXiv 2407.05000, in PEFT's default form: `direction` ArB2r, `scale`
    stable.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params, batches = {"w": jnp.ones((4, 3))}, [jnp.eye(4)]
        >>> loss = lambda params, x: jnp.sum((x @ params["w"] - x[:, :3]) ** 2)
        >>> found = jlora.sketch(loss, params, jlora.LoRA("w", rank=1), batches, kind="gradient")
        >>> rule = jlora.LoRA("w", rank=1, init=jlora.initializers.lora_ga(found))
        >>> lora = jlora.transform(lambda params, x: x @ params["w"], rule)
        >>> base, adapter = lora.init(jax.random.key(0), params, batches[0])
        >>> jax.jit(lora.apply)(base, adapter, batches[0]).round(3).tolist()[0]
        [1.0, 1.0, 1.0]
    """

    gamma: float = 16.0

    kind: ClassVar[str] = "gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        is_positive = is_finite(self.gamma) and self.gamma > 0
        check_field(self, "gamma", is_positive, "be a positive finite number")

    def __call__(self, key: jax.Array, w: BaseLeaf, site: Site, rule: RankRule) -> Start:
        if isinstance(w, Quantized):
            raise ValueError(
                f"lora_ga cannot change W at {site.path!r}, which is quantized. Call init with the "
                "original W, then jlora.quantize the base."
            )
        r = rule.rank
        dtype = dtype_of(site, rule)
        found = self.spectrum_at(site, rule, 2 * r)
        a = jnp.array(found.inputs[..., :r], dtype)
        rows = found.outputs.reshape(*found.values.shape, -1)[..., r : 2 * r, :]
        values = found.values[..., r : 2 * r, None]
        b = rows * (values * (rows.shape[-1] ** 0.25 / math.sqrt(self.gamma)))
        b = jnp.pad(b, [(0, 0)] * (b.ndim - 2) + [(0, r - b.shape[-2]), (0, 0)])
        b = b.reshape(rule.factor_shapes(site)[1]).astype(dtype)
        if isinstance(w, jax.ShapeDtypeStruct):  # an equal object, but not the same one
            return w.update(shape=w.shape), a, b
        return subtract(split_of(w, site, rule), w, a, b), a, b
