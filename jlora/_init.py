"""`transform`, and how A and B start."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ._match import is_named, match
from ._matmul import promote
from ._rules import Full, LoRA, Rule, rule_name
from ._sites import Site, Sites, find_sites
from ._transform import bind, dropout, wrap
from ._tree import check_key, factor_shapes, fold, is_abstract, nest, take
from ._types import LowRank, PyTree, Transformed

Initializer = Callable[[jax.Array, Any, Site, LoRA], tuple[Any, jax.Array, jax.Array]]


def transform(apply_fn: Callable[..., Any], *rules: Rule) -> Transformed:
    r"""Low-rank adaptation of any function whose first argument is a pytree of parameters.

    $$\mathrm{apply}(base, adapter, \ldots) = \mathrm{apply\_fn}(W + s \cdot A B, \ldots)$$

    with $A B$ never formed: each use of W is traced, and its factored form computed in its place.

    Args:
        apply_fn: a function of parameters and anything else that JAX can trace, such as the
            `apply` of a Flax module. It is called with the parameters' own tree and container.
        *rules: `LoRA` and `Full`; the first whose pattern a leaf's path matches takes it.

    Returns:
        Three pure functions:

        - `init(key, params, *args, **kwargs) -> (base, adapter)`. Arguments after `params` are
          `apply_fn`'s own, arrays or `jax.ShapeDtypeStruct`s, and only traced. `base` is `params`,
          leaf for leaf the same arrays; `adapter` is a nested dict pruned to the adapted paths,
          with `LowRank` nodes or, for `Full`, copies. Keys are folded per path.
        - `apply(base, adapter, *args, **kwargs)`: what `apply_fn` returns, adapted.
        - `sites(params, *args, **kwargs) -> Sites`: what can be adapted, and what the rules take.

    Raises:
        TypeError: if a rule is none, or a tree is of a wrong type.
        ValueError: in `init` and `sites`, if a rule takes no leaf or cannot apply to one; in
            `apply`, if the adapter does not fit the base.
        NotImplementedError: if an adapted weight is used in a way that has no factored form.

    Source: Hu et al., LoRA, arXiv 2106.09685, section 4.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> def model(params, x):
        ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
        >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
        >>> lora = jlora.transform(model, jlora.LoRA("up", rank=2), jlora.Full("down"))
        >>> base, adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 4)))
        >>> jlora.count(adapter)
        40
        >>> print(lora.sites(params, jnp.ones((1, 4))))
        path  shape  kind   axes   parameters  rule          rank  trainable
        ────────────────────────────────────────────────────────────────────
        down  8×2    dense  8 → 2          16  Full('down')     -         16
        up    4×8    dense  4 → 8          32  LoRA('up')       2         24
        ────────────────────────────────────────────────────────────────────
        1 of 2 sites adapted; 40 of 48 parameters trainable (83.3%)
    """
    if not callable(apply_fn):
        raise TypeError(f"`apply_fn` must be a function of parameters; got {apply_fn!r}.")
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(f"`rules` must be jlora.LoRA or jlora.Full; got {rule!r}.")

    def sites(params: PyTree, /, *args: Any, **kwargs: Any) -> Sites:
        named = functools.partial(is_named, rules)
        return match(find_sites(apply_fn, params, args, kwargs, named), rules)

    def init(key: jax.Array, params: PyTree, /, *args: Any, **kwargs: Any) -> tuple[PyTree, PyTree]:
        check_key(key)
        if not rules:
            raise ValueError(
                "`rules` is empty, so that nothing would be trained. "
                "Give transform(apply_fn, ...) a jlora.LoRA() or a jlora.Full(pattern)."
            )
        found = sites(params, *args, **kwargs)
        flat, tree = jax.tree.flatten(params)
        base, adapter = [], {}
        for site, w in zip(found.leaves, flat, strict=True):
            if isinstance(site.rule, LoRA):
                w, adapter[site.parts] = _low_rank(fold(key, site.parts), w, site, site.rule)
            elif isinstance(site.rule, Full):
                adapter[site.parts] = _copy(w)
            base.append(w)
        base, adapter = jax.tree.unflatten(tree, base), nest(adapter)
        _check(apply, base, dropout(adapter, key), args, kwargs)
        return base, adapter

    def apply(base: PyTree, adapter: PyTree, /, *args: Any, **kwargs: Any) -> Any:
        return wrap(apply_fn)(bind(base, adapter), *args, **kwargs)

    return Transformed(init, apply, sites)


def _copy(w: Any) -> Any:
    # A copy, so that a training step that donates the adapter does not delete the base.
    return w if is_abstract(w) else jnp.array(w)


def _low_rank(key: jax.Array, w: Any, site: Site, rule: LoRA) -> tuple[Any, LowRank]:
    assert site.layout is not None
    made = (rule.init or kaiming_uniform)(key, w, site, rule)
    shapes = (site.shape, *factor_shapes(site.layout, site.shape, rule.rank))
    got = tuple(map(_form, made)) if isinstance(made, tuple) else made
    expected = tuple((shape, "floating-point") for shape in shapes)
    if got != expected or made[0].dtype != w.dtype:
        raise ValueError(
            f"`init` of {rule_name(rule)} must give W, A and B for {site.path!r}, floating-point, "
            f"of shapes {shapes} and with W's dtype {w.dtype}; got {got}."
        )
    w, a, b = made
    return w, LowRank(a, b, rule.scale, site.layout, rule.dropout, rule.materialize)


def _form(x: Any) -> tuple[Any, str]:
    dtype = getattr(x, "dtype", None)
    floating = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    return getattr(x, "shape", None), "floating-point" if floating else str(dtype)


def _check(
    apply: Callable[..., Any],
    base: PyTree,
    adapter: PyTree,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Traces the adapted model once, so that what `apply` refuses is refused by `init`."""
    # Only what is abstract is traced: Python reads the rest as it does in `apply`.
    rest, put = take((base, adapter, args, kwargs), is_abstract)

    def call(values: list[Any]) -> None:
        base, adapter, args, kwargs = put(values)
        apply(base, adapter, *args, **kwargs)

    jax.eval_shape(call, rest)


# --------------------------------------------------------------------------------- initializers


def kaiming_uniform(key: jax.Array, w: Any, site: Site, rule: LoRA) -> tuple[Any, Any, Any]:
    r"""A uniform in $\pm 1/\sqrt{inputs}$, B zero; the default.

    It is He's uniform initializer with $a = \sqrt 5$, as PEFT and loralib draw A. Where rows of W
    are looked up, each input is one row, so that A is uniform in ±1.

    Args:
        key: a PRNG key.
        w: W, an array or a `jax.ShapeDtypeStruct`.
        site: the site, with its layout.
        rule: the rule, with its rank and dtype.

    Returns:
        `(w, a, b)`: W as it came, A and B.

    Source: He et al., arXiv 1502.01852; LoRA's reference implementation.

    Example:
        >>> import jlora
        >>> jlora.LoRA("kernel", init=jlora.kaiming_uniform).rank
        8
    """
    bound = 1 / math.sqrt(_fan_in(site))
    return _draw(w, site, rule, lambda s, d: jax.random.uniform(key, s, d, -bound, bound))


def gaussian(key: jax.Array, w: Any, site: Site, rule: LoRA) -> tuple[Any, Any, Any]:
    r"""A normal with variance 1 / inputs, B zero: the paper's form.

    Args:
        key: a PRNG key.
        w: W, an array or a `jax.ShapeDtypeStruct`.
        site: the site, with its layout.
        rule: the rule, with its rank and dtype.

    Returns:
        `(w, a, b)`: W as it came, A and B.

    Source: Hu et al., arXiv 2106.09685, section 4.1.

    Example:
        >>> import jlora
        >>> jlora.LoRA("kernel", init=jlora.gaussian).rank
        8
    """
    std = 1 / math.sqrt(_fan_in(site))
    return _draw(w, site, rule, lambda s, d: std * jax.random.normal(key, s, d))


def _draw(w: Any, site: Site, rule: LoRA, sample: Callable[..., jax.Array]) -> tuple[Any, Any, Any]:
    assert site.layout is not None
    dtype = promote(site.dtype, jnp.float32) if rule.dtype is None else rule.dtype
    a_shape, b_shape = factor_shapes(site.layout, site.shape, rule.rank)
    return w, sample(a_shape, dtype), jnp.zeros(b_shape, dtype)


def _fan_in(site: Site) -> int:
    return 1 if site.kind == "embed" else site.inputs
