"""`wrap`, `bind` and the adapted apply: a function of trees that hold `LowRank` leaves."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from . import _control, _linear, _moves  # noqa: F401 - they register their rules
from ._delta import Delta
from ._factor import RANK, Factor
from ._interpret import evaluate, materialize, trace
from ._tree import (
    abstract,
    adapter_leaves,
    check_fits,
    check_key,
    fold,
    is_adapted,
    is_empty,
    is_low_rank,
    leaves_by_path,
    take,
)
from ._types import Adapted, LowRank, Path, PyTree
from ._weight import Weight


def bind(base: PyTree, adapter: PyTree) -> PyTree:
    r"""Puts an adapter into its base: a tree of `base`'s structure with adapted leaves.

    A leaf that `adapter` holds as a `LowRank` becomes the pair of W and $s \cdot A B$, not their
    sum; a leaf that it holds as an array (`Full`) is replaced by it. No array is copied.

    Args:
        base: the frozen tree.
        adapter: a nested dict pruned to the adapted paths, from `init`. `{}` is the adapter of
            nothing: the tree is `base` then.

    Returns:
        A tree for functions under `jlora.wrap`.

    Raises:
        TypeError: if `adapter` is no such tree.
        ValueError: if `adapter` does not fit `base`; every differing path is named.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> f = lambda params, x: x @ params["w"]
        >>> lora = jlora.transform(f, jlora.LoRA("w", rank=2))
        >>> base, adapter = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, jnp.ones((1, 4)))
        >>> jlora.wrap(f)(jlora.bind(base, adapter), jnp.ones((1, 4))).shape
        (1, 3)
    """
    found = {} if is_empty(adapter) else adapter_leaves(adapter)
    check_fits(base, found)

    def join(parts: Path, w: Any) -> Any:
        delta = found.get(parts)
        if isinstance(delta, LowRank):
            return Adapted(w, delta)
        return w if delta is None else delta

    leaves = [join(path, w) for path, w in leaves_by_path(base)]
    return jax.tree.unflatten(jax.tree.structure(base), leaves)


def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
    r"""Makes `fn` accept, in any argument, trees from `jlora.bind`.

    The result computes what `fn` computes with W + s·A·B at the adapted leaves, in factored form:
    `fn` is traced to a jaxpr with W in place, which is evaluated with the factors beside W.

    Args:
        fn: any function that JAX can trace with respect to the adapted leaves. Other arguments
            stay as they are: Python values remain Python values, concrete arrays concrete.

    Returns:
        A function with `fn`'s arguments and outputs. Differentiable in reverse mode, also twice;
        forward mode stops at the product's `custom_vjp`.

    Raises:
        NotImplementedError: where `fn` uses an adapted weight in a way that has no factored form,
            naming path, primitive and source line. See `LoRA(materialize=True)`.

    Example:
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
        bound, put = take((args, kwargs), is_adapted, is_adapted)
        found = leaves_by_path((args, kwargs), is_adapted)
        # Paths start with 0 or 1 for args or kwargs, then the argument.
        paths = ["/".join(path[2:]) for path, x in found if is_adapted(x)]
        weights = [_weight(leaf, path) for leaf, path in zip(bound, paths, strict=True)]

        def plain(*values: Any) -> Any:
            args, kwargs = put(values)
            return fn(*args, **kwargs)

        jaxpr, finish = trace(plain, [abstract(w.value) for w in weights], paths)
        outs = evaluate(jaxpr, *weights)
        return finish([materialize(x, "the function's outputs") for x in outs])

    return wrapped


def _weight(leaf: Adapted, path: str) -> Weight:
    w, delta = leaf.base, leaf.delta
    return Weight(jnp.asarray(w), (as_delta(delta, w.shape),), path, delta.materialize)


def as_delta(delta: LowRank, shape: tuple[int, ...]) -> Delta:
    """The factors of `delta` with their axes named by those of a weight of `shape`."""
    layout = delta.layout
    stack, inputs, outputs = layout.stack, layout.inputs, layout.outputs
    a, b = delta.a, delta.b
    if layout.slots is not None:
        a, b = _merge_slots(delta, shape)
    return Delta(
        Factor(a, (*stack, *inputs, RANK)),
        Factor(b, (*stack, RANK, *outputs)),
        None if delta.key is None else Factor(delta.key, stack),
        delta.scale,
        delta.dropout,
    )


def _merge_slots(delta: LowRank, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """One A of rank slots·r, and one B whose rows reach only their own slot of the outputs."""
    assert delta.layout.slots is not None
    count, chosen, axis = delta.layout.slots
    n, out = len(delta.layout.stack), delta.layout.outputs.index(axis)
    r, length = delta.a.shape[-1], shape[axis] // count

    def place(i: int, slot: int) -> jax.Array:
        b = jnp.take(delta.b, i, axis=n)  # (stack…, r, outputs…)
        pads = [(0, 0)] * b.ndim
        pads[n + 1 + out] = (slot * length, (count - 1 - slot) * length)
        return jnp.pad(b, pads)

    b = jnp.concatenate([place(i, slot) for i, slot in enumerate(chosen)], axis=n)
    a = jnp.moveaxis(delta.a, n, -2)  # (stack…, inputs…, slots, r)
    return a.reshape(*a.shape[:-2], len(chosen) * r), b


def dropout(adapter: PyTree, key: jax.Array) -> PyTree:
    r"""An adapter whose low-rank paths drop inputs: $y = x W + s\,(\mathrm{drop}(x) A) B$.

    Each input of A is zero with the rule's probability p and else divided by 1 - p, so that the
    expectation is that without dropout. One mask for a site, a layer of a stack and a key.

    Args:
        adapter: from `init`; sites whose rule has `dropout=0` are left as they are.
        key: a PRNG key, folded with each site's path and split over its stack.

    Returns:
        An adapter for `apply`, with keys in it. Differentiate with respect to the one without.

    Source: Hu et al., arXiv 2106.09685, appendix D.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=2, dropout=0.5))
        >>> x = jnp.ones((1, 4))
        >>> base, adapter = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, x)
        >>> noisy = jlora.dropout(adapter, jax.random.key(1))
        >>> lora.apply(base, noisy, x).shape
        (1, 3)
    """
    check_key(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)

    def seed(path: Path, leaf: Any) -> Any:
        if not isinstance(leaf, LowRank) or not leaf.dropout:
            return leaf
        mine = fold(key, path)
        stack = leaf.a.shape[: len(leaf.layout.stack)]
        return leaf._replace(key=jax.random.split(mine, stack) if stack else mine)

    leaves = [seed(path, leaf) for path, leaf in leaves_by_path(adapter, is_low_rank)]
    return jax.tree.unflatten(jax.tree.structure(adapter, is_leaf=is_low_rank), leaves)
