"""Finds the sites of a model, by tracing it on shapes.

The interpreter of `apply` evaluates the model once, with a `Weight` without a change for each
parameter, and records how each weight is used. So what is found is what `apply` can compute.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._adapters import change_of, is_node
from ._core import (
    Change,
    ProductUse,
    Unsupported,
    Uses,
    ValueReadError,
    Weight,
    abstract,
    as_array,
    evaluate,
    leaf_weight,
    take,
    trace,
)
from ._foreign import check_kept, check_leaf
from ._quantized import is_quantized
from ._rules import Full
from ._sites import Site, Sites
from ._tree import flatten, is_abstract, leaves_by_path
from ._types import Layout, Path, PyTree


class Traced(NamedTuple):
    """The model's jaxpr as a function of some of its parameters and of abstract arguments.

    Attributes:
        jaxpr: the jaxpr.
        specs: the types of its inputs.
        paths: the paths of the parameters; they are its first inputs.
    """

    jaxpr: Any
    specs: list[jax.ShapeDtypeStruct]
    paths: list[Path]

    def uses(self, weights: set[Path]) -> Uses:
        """Finds how the model uses the leaves at the paths `weights`."""
        found = Uses()

        def weight(path: Path, x: Any) -> Weight:
            w = leaf_weight(x, Change(), "/".join(path), materialize=True)
            return dataclasses.replace(w, origin=w.origin._replace(uses=found))

        self._evaluate(lambda path, x: weight(path, x) if path in weights else x)
        return found

    def check(self, adapter: dict[Path, Any]) -> None:
        """Raises if the adapted model uses a weight in a way that has no factored form."""
        nodes = {path: x for path, x in adapter.items() if is_node(x)}

        def changed(path: Path, x: Any) -> Any:
            if (node := nodes.get(path)) is None:
                return x
            name = "/".join(path)
            change = change_of(node, x, name)
            return leaf_weight(x, change, name, node.materialize)

        self._evaluate(changed)

    def _evaluate(self, weight: Callable[[Path, Any], Any]) -> None:
        def call(*values: Any) -> None:
            n = len(self.paths)
            weights = map(weight, self.paths, values[:n])
            for x in evaluate(self.jaxpr, *weights, *values[n:]):
                as_array(x, lambda: "the function's outputs", added=True)

        jax.eval_shape(call, *self.specs)

    @property
    def used(self) -> set[Path]:
        """The paths of the parameters that an output or another operation reads."""
        read = {id(v) for eqn in self.jaxpr.eqns for v in eqn.invars}
        read |= {id(v) for v in self.jaxpr.outvars}
        variables = zip(self.paths, self.jaxpr.invars, strict=False)
        return {path for path, v in variables if id(v) in read}


def find_sites(
    apply_fn: Callable[..., Any],
    params: PyTree,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wanted: Callable[[str], type | None],
) -> tuple[Sites, Traced]:
    """Traces `apply_fn` on shapes and finds how it uses each leaf of `params`.

    `wanted` gives the type of the rule that may take the leaf at a path. If Python code of
    `apply_fn` reads the value of a leaf, only leaves that a method may take are traced, and the
    other leaves are not listed as sites.
    """
    shapes = {path: _abstract(x, path) for path, x in leaves_by_path(params)}
    rules = {path: wanted("/".join(path)) for path in shapes}
    matrices = {path for path, x in shapes.items() if _is_matrix(x)}
    try:
        full = {path for path, rule in rules.items() if rule is Full}
        traced = _trace(apply_fn, params, args, kwargs, matrices | full)
    except ValueReadError:
        matrices &= {path for path, rule in rules.items() if rule not in (None, Full)}
        traced = _trace(apply_fn, params, args, kwargs, matrices)
    uses, used = traced.uses(matrices), traced.used

    schemes = {path: x.scheme for path, x in leaves_by_path(params) if is_quantized(x)}

    def site(path: Path, x: Any) -> Site:
        key = "/".join(path)
        found = _site(path, x, uses.products[key], uses.unsupported[key])
        is_used = path in used if path in traced.paths else None
        return dataclasses.replace(found, used=is_used, scheme=schemes.get(path))

    return Sites(tuple(site(path, x) for path, x in shapes.items())), traced


def _trace(
    apply_fn: Callable[..., Any],
    params: PyTree,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    paths: set[Path],
) -> Traced:
    """Traces the model as a function of the leaves at `paths` and of everything abstract."""
    found, structure = leaves_by_path(params), flatten(params)[1]
    leaves = [x for _, x in found]
    at = [i for i, (path, x) in enumerate(found) if path in paths or _is_abstract(x)]
    rest, put = take((args, kwargs), is_abstract)

    def call(*values: Any) -> Any:
        args, kwargs = put(values[len(at) :])
        full = dict(enumerate(leaves)) | dict(zip(at, values, strict=False))
        tree = jax.tree.unflatten(structure, list(full.values()))
        outputs = apply_fn(tree, *args, **kwargs)
        check_kept(tree, {path: full[i] for i, (path, _) in enumerate(found)})
        return outputs

    specs = [_abstract(leaves[i], found[i][0]) for i in at]
    specs += [abstract(x if hasattr(x, "dtype") else jnp.asarray(x)) for x in rest]
    jaxpr, _ = trace(call, specs, ["/".join(path) for path in paths])
    return Traced(jaxpr, specs, [found[i][0] for i in at])


def _is_abstract(x: Any) -> bool:
    return is_abstract(x) or is_quantized(x)


def _abstract(x: Any, parts: Path) -> jax.ShapeDtypeStruct:
    if is_quantized(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    check_leaf(x, parts)
    return abstract(x if hasattr(x, "dtype") else jnp.asarray(x))


def _is_matrix(x: Any) -> bool:
    return x.ndim >= 2 and jnp.issubdtype(x.dtype, jnp.floating)


def _site(path: Path, x: Any, products: list[ProductUse], unsupported: list[Unsupported]) -> Site:
    kinds = {u.kind for u in products}
    kind = next((k for k in ("embed", "conv", "dense") if k in kinds), None)
    # The layout of a tied embedding is that of its lookup: A has the rows.
    first = next((u for u in products if u.kind == kind), None)
    layout = first and _layout(first.inputs, first.outputs, x.shape)
    if first and not layout:
        lost = "a product that leaves it no inputs or no outputs"
        unsupported = [*unsupported, Unsupported(lost, ())]
    wanted = None
    if unsupported:
        *rest, last = range(x.ndim)
        each = (_materialized_layout(u.axes, x.shape) for u in unsupported if u.axes)
        wanted = next(filter(None, each), Layout((), tuple(rest), (last,)))
    kind = kind if layout else None
    return Site(path, x.shape, x.dtype, kind, layout, tuple(unsupported), wanted)


def _materialized_layout(axes: tuple[frozenset[int], ...], shape: tuple[int, ...]) -> Layout | None:
    """Makes the last axis of the weight its outputs."""
    return _layout(frozenset().union(*axes[:-1]), axes[-1], shape)


def _layout(
    contracted: frozenset[int], kept: frozenset[int], shape: tuple[int, ...]
) -> Layout | None:
    """Makes contracted axes inputs, kept axes outputs, and all others the stack."""
    inputs = [d for d in range(len(shape)) if d in contracted]
    outputs = [d for d in range(len(shape)) if d in kept - contracted]
    stack = [d for d in range(len(shape)) if d not in contracted | kept]
    # A reshape may lose track of an axis of length 1: it can take any role.
    for role in (inputs, outputs):
        if not role and (one := next((d for d in stack if shape[d] == 1), None)) is not None:
            stack.remove(one)
            role.append(one)
    if not outputs and not kept:  # the model contracts single vectors of it: a stack of outputs
        stack, outputs = [], stack
    return Layout(tuple(stack), tuple(inputs), tuple(outputs)) if inputs and outputs else None
