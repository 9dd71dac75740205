"""LoftQ: W is quantized, and A and B correct the error."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._quantized import Form, Quantized, Scheme, form_of, is_quantized, quantize_weight, spell
from .._rules import check_int, name_mistake, rule_name
from ._initializer import Initializer
from ._pissa import factor_largest
from ._split import Split, check_values, keep_sharding, map_stack, split_array, split_of


@dataclasses.dataclass(frozen=True, repr=False)
class loftq(Initializer):
    r"""LoftQ: quantizes W, and starts A and B where they best correct the error.

    Two steps alternate, from $A B = 0$ on: $Q = q(W - s \cdot A B)$, and $s \cdot A B$ becomes the
    r largest singular values of $W - Q$. The base is Q, a `jlora.Quantized`. `params` must
    not be quantized at these leaves, and leaves that the rule does not take stay as they are.
    QPiSSA, `jlora.quantize` of the base that `pissa` returns, takes the largest part of W itself
    out of what is quantized: if singular values decay it loses less.

    Here $s \cdot A B$ is the correction for every scale; in PEFT it is $A B$, right where alpha is
    the rank. The base differs from `params`: see the guide "Choose rules".

    Each iteration takes a full SVD of each matrix, one after the other, and gathers what `pissa`
    gathers.

    Args:
        scheme: such as `jlora.NF4()`, without a pattern: the rule says which leaves.
        iterations: how many times both steps are taken, at least 1.

    Raises:
        TypeError: if `scheme` is none.
        ValueError: if `scheme` has a pattern, or `iterations` is no integer of at least 1; in
            `init`, as `pissa` does, and if W is quantized already or blocks do not divide it.

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
                "`scheme` of loftq must be one such as jlora.NF4(); got "
                f"{name_mistake(self.scheme)}."
            )
        if self.scheme.pattern is not None:
            raise ValueError(
                f"`scheme` of loftq has the pattern {self.scheme.pattern!r}, but the rule says "
                "which leaves it takes. Leave the pattern out."
            )
        check_int("`iterations` of loftq", self.iterations, 1)
        object.__setattr__(self, "iterations", int(self.iterations))

    def __call__(self, key: jax.Array, w: Any, site: Any, rule: Any) -> Any:
        check_values(w, site, rule)
        spec = split_of(w, site, rule, self._form(w, site, rule))
        return keep_sharding(spec, functools.partial(_alternate, self), key, w)

    def _form(self, w: Any, site: Any, rule: Any) -> Form:
        if is_quantized(w):
            raise ValueError(
                f"{site.path!r} of `params` is quantized already, as {spell(w.scheme)}, and "
                f"loftq, the start of {rule_name(rule)}, quantizes it itself. Give "
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

        def next_target(_: int, target: jax.Array) -> jax.Array:
            leaf, rest, _, _ = correct(target)
            return leaf.array(jnp.float32) + rest

        target = lax.fori_loop(0, start.iterations - 1, next_target, wide)
        leaf, _, a, b = correct(target)
        return leaf, a, b

    leaf, a, b = map_stack(of_matrix, spec, key, w)
    return dataclasses.replace(leaf, dtype=w.dtype), a, b
