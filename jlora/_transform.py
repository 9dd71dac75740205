"""`transform` and its parts, `wrap` and `dropout`."""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ._adapters import AdapterLeaf, check_registered, is_node, state
from ._arrays import pick
from ._core import Change, Weight, as_array, evaluate, leaf_weight
from ._find_sites import Arguments, Traced, find_sites
from ._foreign import check_apply_fn
from ._keys import check_key, fold
from ._match import match
from ._node import BoundLeaf, weight_of
from ._quantized import BaseLeaf, Quantized, is_quantized
from ._rules import rule_name
from ._site import Frozen, Full, Rule, Site, check_rules
from ._sites import Sites
from ._trace import trace
from ._tree import adapter_leaves, bind, flatten, is_adapted, is_empty, leaves_by_path, nest
from ._types import Path, PyTree


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Transformed:
    """What `jlora.transform` returns: three pure functions, which it unpacks to.

    Attributes:
        init: `(key, params, *args, **kwargs) -> (base, adapter)`.
        apply: `(base, adapter, *args, **kwargs) -> outputs of the apply function`.
        sites: `(params, *args, **kwargs) -> Sites`.
        apply_fn: the function that was adapted.
        rules: its rules.
    """

    init: Callable[..., tuple[PyTree, PyTree]]
    apply: Callable[..., Any]
    sites: Callable[..., Sites]
    apply_fn: Callable[..., Any]
    rules: tuple[Rule, ...]

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter((self.init, self.apply, self.sites))

    def __repr__(self) -> str:
        listed = "".join(f", {rule_name(rule)}" for rule in self.rules)
        return f"Transformed({function_name(self.apply_fn)}{listed})"


def function_name(fn: Callable[..., Any]) -> str:
    """Returns the name of a function for messages; a method has the name of its type before it."""
    if isinstance(fn, functools.partial):
        return f"partial({function_name(fn.func)})"
    if inspect.ismethod(fn):
        return f"{type(fn.__self__).__name__}.{fn.__name__}"
    return getattr(fn, "__name__", type(fn).__name__)


def transform(apply_fn: Callable[..., Any], *rules: Rule) -> Transformed:
    r"""Adapts a function whose first argument is a pytree of parameters.

    $$\mathrm{apply}(base, adapter, \ldots) = \mathrm{apply\_fn}(W + s \cdot A B, \ldots)$$

    jlora traces `apply_fn` and replaces each product x·W by its factored form x·W + s·(x·A)·B. It
    does not form W + s·A·B.

    Args:
        apply_fn: a function that JAX can trace, such as the `apply` of a Flax module. Its first
            argument is the parameters, which it gets in their own containers.
        *rules: `LoRA`, `DoRA`, `Rows`, `Full` or `Frozen`. Each leaf of the parameters gets the
            first rule whose pattern matches its path. One rule may be without a pattern: it takes
            the dense and convolutional sites that are left, wherever it stands.

    Returns:
        Three pure functions:

        - `init(key, params, *args, **kwargs) -> (base, adapter)`. The arguments after `params` are
          those of `apply_fn`, as arrays or `jax.ShapeDtypeStruct`s; they are only traced. `base`
          holds the arrays of `params` themselves, unless an initializer changes them. `adapter` is
          a nested dict with the adapted paths only. Its leaves are nodes, such as the `LowRank` of
          `LoRA`, and, for `Full`, copies of the arrays. Each path has its own key, folded from
          `key`.
        - `apply(base, adapter, *args, **kwargs)` returns what `apply_fn` returns with adapted
          weights. With `{}` as the adapter it is the base model.
        - `sites(params, *args, **kwargs) -> Sites` lists the weights that can be adapted (*sites*),
          with the rule of each.

    Raises:
        TypeError: if one of `rules` is not a rule, or a tree has the wrong type.
        ValueError: if two rules are without a pattern; in `init` and `sites`, if a rule matches no
            leaf, or a leaf that it cannot adapt; in `init`, if there are no rules; in `apply`, if
            the adapter does not fit the base.
        NotImplementedError: if the model uses an adapted weight where W + s·A·B has no factored
            form; in `apply`, as in `merge`.

    Source: Hu et al., LoRA, arXiv 2106.09685, section 4.

    Examples:
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
    check_apply_fn(apply_fn)
    for rule in check_rules(rules, unpack=True):
        check_registered(rule)
    # Partial applications of this module's functions, so that what is returned can be pickled.
    return Transformed(
        functools.partial(_init, apply_fn, rules),
        functools.partial(_apply, apply_fn),
        functools.partial(_sites, apply_fn, rules),
        apply_fn,
        rules,
    )


def _sites(
    apply_fn: Callable[..., Any], rules: tuple[Rule, ...], params: PyTree, /, *args: Any, **kw: Any
) -> Sites:
    return _find(apply_fn, rules, (params, args, kw))[0]


def _find(
    apply_fn: Callable[..., Any], rules: tuple[Rule, ...], call: Arguments
) -> tuple[Sites, Traced]:
    sites, traced = find_sites(apply_fn, rules, call)
    return match(sites, rules), traced


def _apply(
    apply_fn: Callable[..., Any], base: PyTree, adapter: PyTree, /, *args: Any, **kwargs: Any
) -> Any:
    return wrap(apply_fn)(bind(base, adapter), *args, **kwargs)


def _init(
    apply_fn: Callable[..., Any],
    rules: tuple[Rule, ...],
    key: jax.Array,
    params: PyTree,
    /,
    *args: Any,
    **kwargs: Any,
) -> tuple[PyTree, PyTree]:
    check_key(key)
    if all(isinstance(rule, Frozen) for rule in rules):
        why = "has only jlora.Frozen" if rules else "is empty"
        raise ValueError(
            f"`rules` {why}, so nothing would be trained. "
            "Give transform(apply_fn, ...) a jlora.LoRA() or a jlora.Full(pattern)."
        )
    sites, traced = _find(apply_fn, rules, (params, args, kwargs))
    all_linear = [rule_name(rule) for rule in rules if rule.pattern is None]
    if all_linear and (missed := sites.missed):
        warnings.warn(
            f"{all_linear[0]} does not adapt {len(missed)} weights, because the model uses them "
            "where W + s·A·B has no factored form: "
            + "; ".join(f"{s.path} ({s.unsupported_uses[0]})" for s in missed[:3])
            + ("; …" if len(missed) > 3 else "")
            + ". To train them, name them in a rule with materialize=True or in jlora.Full.",
            stacklevel=2,
        )
    flat, tree = flatten(params)
    base, adapter = [], {}
    for site, w in zip(sites.leaves, flat, strict=True):
        if site.rule is not None and site.is_trained:
            w, adapter[site.parts] = _start(site.rule, site, fold(key, site.parts), w)
        base.append(w)
    adapter = nest(adapter)
    found = leaves_by_path(dropout(adapter, key), is_node)
    traced.check({path: x for path, x in found if is_node(x)})
    return jax.tree.unflatten(tree, base), adapter


def _start(rule: Rule, site: Site, key: jax.Array, w: BaseLeaf) -> tuple[BaseLeaf, PyTree]:
    """Returns what a rule starts with at a site; raises unless it has the rule's shapes."""
    made = rule.start(key, w, site)
    if isinstance(rule, Full):
        return made
    is_pair = isinstance(made, tuple) and not is_node(made) and len(made) == 2
    node: Any = made[1] if is_pair else None
    if not isinstance(node, rule.node):
        got = " and ".join(type(x).__name__ for x in (made if is_pair else [made]))
        raise TypeError(
            f"`start` of {rule_name(rule)} must return W and its {rule.node.__name__}, as a tuple; "
            f"got {got} for {site.name}."
        )
    found, expected = (
        {"W": (tuple(x.shape), x.dtype), "layout": layout}
        for x, layout in ((made[0], node.layout), (w, site.layout))
    )
    found |= {name: tuple(jnp.shape(x)) for name, x in state(node).items()}
    shapes = rule.shapes(site.layout, site.shape)
    expected |= {name: shapes.get(name) for name in found.keys() - expected.keys()}
    if wrong := [name for name in found if found[name] != expected[name]]:
        listed = "; ".join(f"{x}: expected {expected[x]}, got {found[x]}" for x in wrong)
        raise ValueError(f"`start` of {rule_name(rule)} does not fit {site.name}: {listed}.")
    return made


def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
    r"""Makes `fn` accept trees from `jlora.bind` in any argument.

    The new function computes what `fn` computes with W + s·A·B at the adapted leaves. It traces
    `fn` with W to a jaxpr, and evaluates the jaxpr with A and B beside W, in factored form.

    Args:
        fn: any function that JAX can trace with respect to the adapted leaves. Its other arguments
            are not traced: Python values and concrete arrays reach `fn` as they are.

    Returns:
        A function with the arguments and outputs of `fn`. It can be differentiated to any order, in
        forward and in reverse mode. Call it under `jax.jit`: otherwise each call traces `fn` again,
        and compiles its loops again.

    Raises:
        NotImplementedError: if `fn` uses an adapted weight where W + s·A·B has no factored form.
            The error names the path, the primitive and the source line. See
            `LoRA(materialize=True)`.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> loss = lambda x, params: ((x @ params["w"]) ** 2).sum()
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=1, alpha=1))
        >>> x, params = jnp.ones((2, 4)), {"w": jnp.ones((4, 3))}
        >>> base, adapter = lora.init(jax.random.key(0), params, x)
        >>> float(jlora.wrap(loss)(x, jlora.bind(base, adapter)))
        96.0
    """

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = args, kwargs
        _, put = pick(given, _is_weight, _is_weight)
        bound = jax.tree.map(lambda x: x if _is_weight(x) else None, given, is_leaf=_is_weight)
        # Paths start with 0 or 1 for args or kwargs, then the argument.
        found = [("/".join(path[2:]), leaf) for path, leaf in leaves_by_path(bound, is_adapted)]
        weights = [_weight(leaf, path) for path, leaf in found]

        def plain(*values: Any) -> Any:
            args, kwargs = put(values)
            return fn(*args, **kwargs)

        jaxpr, finish = trace(plain, [w.type for w in weights], [path for path, _ in found])
        try:
            outs = evaluate(jaxpr, *weights)
        except Exception as e:
            if type(e).__name__ == "ShardingTypeError":  # of JAX 0.12, in any replay of a jaxpr
                e.add_note("If this is not under jax.jit, call the gradient under jax.jit.")
            raise
        # A literal is no array yet.
        return finish([jnp.asarray(as_array(x, lambda: "the function's outputs")) for x in outs])

    return wrapped


def _is_weight(x: object) -> bool:
    return is_adapted(x) or is_quantized(x)


def _weight(leaf: BoundLeaf | Quantized, path: str) -> Weight:
    if is_quantized(leaf):
        return leaf_weight(leaf, Change(), path, materialize=True)
    w = leaf.base if is_quantized(leaf.base) else jnp.asarray(leaf.base)
    return weight_of(leaf.delta, w, path)


def dropout(adapter: PyTree, key: jax.Array) -> PyTree:
    r"""Turns dropout on: returns an adapter with keys, $y = x W + s\,(\mathrm{drop}(x) A) B$.

    Each input of A becomes zero with the rule's probability p; otherwise it is divided by 1 - p, so
    the expectation does not change. Each site, layer of a stack, use of a weight and key has its
    own mask: a tied weight drops other inputs at each product, and a loop at each iteration. In a
    `shard_map` of the model, shards of an input have their own masks too, but with
    `check_vma=False`, which hides whether inputs are shards or copies, all have the same.

    Args:
        adapter: an adapter from `init`, or a table of `jlora.many`, prepared or not. Sites whose
            rule has `dropout=0` do not change.
        key: a PRNG key. It is folded with each site's path, and split over the slots of a table and
            over a stack.

    Returns:
        An adapter with keys, for `apply`. Differentiate with respect to the adapter without keys.

    Raises:
        TypeError: if `key` is not one PRNG key, or `adapter` is not an adapter.

    Source: Hu et al., arXiv 2106.09685, appendix D.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=2, dropout=0.5))
        >>> x = jnp.ones((1, 4))
        >>> base, adapter = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, x)
        >>> noisy = jlora.dropout(adapter, jax.random.key(1))
        >>> lora.apply(base, noisy, x).shape
        (1, 3)
    """
    check_key(key)
    if not is_empty(adapter):
        adapter_leaves(adapter)  # raises unless it is an adapter
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)

    def seed(path: Path, leaf: AdapterLeaf) -> AdapterLeaf:
        if not is_node(leaf) or not leaf.dropout:
            return leaf
        mine = fold(key, path)
        shape = leaf.key_shape
        return leaf._replace(key=jax.random.split(mine, shape) if shape else mine)

    leaves = [seed(path, leaf) for path, leaf in leaves_by_path(adapter, is_node)]
    return jax.tree.unflatten(jax.tree.structure(adapter, is_leaf=is_node), leaves)
