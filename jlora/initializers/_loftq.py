"""LoftQ: W is quantized, and A and B correct the error."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._quantized import BaseLeaf, Form, Quantized, Scheme, form_of, quantize_weight, spell
from .._rules import check_int, name_mistake, rule_name
from .._site import Site
from ._initializer import Initializer, RankRule, Start
from ._pissa import factor_largest
from ._split import Split, check_values, keep_sharding, map_stack, split_array, split_of


@dataclasses.dataclass(frozen=True, repr=False)
class loftq(Initializer):
    r"""LoftQ: quantizes W, and sets A and B to the best correction of the error.

    Starting at $A B = 0$, it alternates two steps: $Q = q(W - s \cdot A B)$, and $s \cdot A B$
    becomes the part of $W - Q$ with the r largest singular values. The base is Q, a
    `jlora.Quantized`. Give `init` parameters that are not quantized at these leaves. Leaves that
    the rule does not match are not quantized.

    Compare it with QPiSSA: `jlora.quantize` of the base that `pissa` returns. QPiSSA removes the
    largest part of W before quantizing; it loses less if the singular values of W decay.

    The correction is $s \cdot A B$ at every scale s. PEFT's correction is $A B$, which is right
    only if alpha is the rank. The base differs from `params`: see the guide "Initialize A and B".

    Each iteration computes a full SVD of each matrix, one after the other. On a mesh it gathers
    what `pissa` gathers.

    Args:
        scheme: a scheme without a pattern, such as `jlora.NF4()`; the rule selects the leaves.
        iterations: how often both steps are done, at least 1.

    Raises:
        TypeError: if `scheme` is not a scheme.
        ValueError: if `scheme` has a pattern, or `iterations` is not an integer of at least 1; in
            `init`, if W has no values, is not finite, or is quantized already, or blocks do not
            divide it.
        NotImplementedError: in `init`, within a `shard_map` that may shard W.

    Source: Li et al., LoftQ, arXiv 2310.08659, algorithm 1.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> start = jlora.initializers.loftq(jlora.NF4(), iterations=2)
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=4, init=start))
        >>> params, x = {"w": jax.random.normal(jax.random.key(0), (64, 32))}, jnp.ones((1, 64))
        >>> base, adapter = lora.init(jax.random.key(1), params, x)
        >>> base
        {'w': Quantized(float32[64,32], NF4(block=64, double=True))}
    """

    scheme: Scheme
    iterations: int = 5

    def __post_init__(self) -> None:
        if not isinstance(self.scheme, Scheme):
            raise TypeError(
                "`scheme` of loftq must be a scheme such as jlora.NF4(); got "
                f"{name_mistake(self.scheme)}."
            )
        if self.scheme.pattern is not None:
            raise ValueError(
                f"`scheme` of loftq must have no pattern, as the rule selects the leaves; got "
                f"{self.scheme.pattern!r}. Leave it out."
            )
        check_int("iterations", self.iterations, 1, "loftq")
        object.__setattr__(self, "iterations", int(self.iterations))

    def __call__(self, key: jax.Array, w: BaseLeaf, site: Site, rule: RankRule) -> Start:
        w = check_values(w, site, rule)
        spec = split_of(w, site, rule, self._form(w, site, rule))
        return keep_sharding(spec, functools.partial(_alternate, self), key, w)

    def _form(self, w: BaseLeaf, site: Site, rule: RankRule) -> Form:
        if isinstance(w, Quantized):
            raise ValueError(
                f"{site.path!r} of `params` is quantized already, as {spell(w.scheme)}, but loftq, "
                f"the `init` of {rule_name(rule)}, quantizes it itself. Give "
                "jlora.dequantize(params), or use jlora.initializers.pissa."
            )
        try:
            return form_of(self.scheme, site.shape, site.layout, site.kind)
        except ValueError as e:
            raise ValueError(f"loftq cannot quantize {site.path!r}. {e}") from None


@functools.partial(jax.jit, static_argnums=(0, 1))
def _alternate(start: loftq, spec: Split, key: jax.Array, w: jax.Array) -> tuple[Any, Any, Any]:
    def of_matrix(spec: Split, key: jax.Array, w: jax.Array) -> tuple[Quantized, Any, Any]:
        wide = w.astype(jnp.float32)

        def correct(target: jax.Array) -> tuple[Quantized, Any, Any, Any]:
            """Returns the codes of `target`, W - codes - s·A·B, A and B."""
            assert spec.form is not None
            leaf = quantize_weight(target, start.scheme, spec.form)
            return leaf, *split_array(factor_largest, spec, key, wide - leaf.array(jnp.float32))

        def next_target(_: jax.Array, target: jax.Array) -> jax.Array:
            leaf, rest, _, _ = correct(target)
            return leaf.array(jnp.float32) + rest

        target = lax.fori_loop(0, start.iterations - 1, next_target, wide)
        leaf, _, a, b = correct(target)
        return leaf, a, b

    leaf, a, b = map_stack(of_matrix, spec, key, w)
    return dataclasses.replace(leaf, dtype=w.dtype), a, b
