"""Finds the sites of a model by tracing it on shapes.

The interpreter of `apply` evaluates the model once, with each parameter as a `Weight` without a
change, and records how each weight is used. So it finds exactly the sites that `apply` can adapt.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._adapters import Node
from ._arrays import abstract, pick
from ._compat import scan_counts
from ._core import Change, Operand, as_array, evaluate, leaf_weight
from ._foreign import check_kept, check_leaf, note_call
from ._node import weight_of
from ._quantized import is_quantized
from ._rules import matches, precedence
from ._site import Frozen, Full, Rule, Site, Unsupported
from ._sites import Sites, Uses
from ._trace import ValueReadError, trace
from ._tree import flatten, is_abstract, leaves_by_path, refuse_module
from ._types import Layout, Path, PyTree

# The parameters, and the other arguments.
Arguments = tuple[PyTree, tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Traced:
    """The jaxpr of the model, a function of some of its parameters and of abstract arguments.

    Attributes:
        jaxpr: the jaxpr.
        types: the types of its inputs.
        paths: the paths of the parameters; they are its first inputs.
    """

    jaxpr: Any
    types: list[jax.ShapeDtypeStruct]
    paths: list[Path]

    def uses(self, weights: set[Path]) -> Uses:
        """Finds how the model uses the leaves at the paths `weights`."""
        found = Uses()

        def weight(path: Path, x: jax.Array) -> Operand:
            if path not in weights:
                return x
            return leaf_weight(x, Change(), "/".join(path), materialize=True, uses=found)

        self._evaluate(weight)
        return found

    def check(self, nodes: dict[Path, Node]) -> None:
        """Raises if the model, adapted by `nodes`, uses a weight without a factored form."""
        self._evaluate(lambda p, x: weight_of(nodes[p], x, "/".join(p)) if p in nodes else x)

    def _evaluate(self, weight: Callable[[Path, Any], Any]) -> None:
        """Evaluates the jaxpr on the parameters that it reads; the others cost nothing."""
        read = {id(v) for eqn in self.jaxpr.eqns for v in eqn.invars}
        read.update(map(id, self.jaxpr.outvars))
        n = len(self.paths)
        taken = [i for i, v in enumerate(self.jaxpr.invars) if i >= n or id(v) in read]

        def call(*values: Any) -> None:
            given: list[Any] = [None] * len(self.types)
            for i, x in zip(taken, values, strict=True):
                given[i] = weight(self.paths[i], x) if i < n else x
            for x in evaluate(self.jaxpr, *given):
                as_array(x, lambda: "the function's outputs", added=True)

        jax.eval_shape(call, *(self.types[i] for i in taken))

    @functools.cached_property
    def used(self) -> dict[Path, bool]:
        """Whether the outputs depend on each parameter, other than behind `stop_gradient`."""
        found = _find_used(self.jaxpr, [True] * len(self.jaxpr.outvars))
        return dict(zip(self.paths, found, strict=False))


def _find_used(jaxpr: Any, wanted: Sequence[bool]) -> list[bool]:
    """Finds the inputs that the wanted outputs, or effects, depend on."""
    live = {id(v) for v, is_wanted in zip(jaxpr.outvars, wanted, strict=True) if is_wanted}
    inputs = set(map(id, jaxpr.invars))
    for eqn in reversed(jaxpr.eqns):
        outs = [id(v) in live for v in eqn.outvars]
        if any(outs) or eqn.effects:
            pairs = zip(eqn.invars, _find_read(eqn, outs), strict=True)
            live.update(id(v) for v, is_read in pairs if is_read and _is_kept(v, inputs))
    return [id(v) in live for v in jaxpr.invars]


def _is_kept(v: Any, inputs: set[int]) -> bool:
    """Whether what depends on a variable counts: not by integers, which have no gradient."""
    dtype = getattr(v.aval, "dtype", None)
    return id(v) in inputs or dtype is None or jnp.issubdtype(dtype, jnp.inexact)


def _find_read(eqn: Any, wanted: list[bool]) -> list[bool]:
    """Finds the operands that the wanted outputs of an equation depend on."""
    p = eqn.params
    match eqn.primitive.name:
        case "stop_gradient":
            return [False]
        case "jit" | "remat2" | "shard_map":
            return _find_used(p["jaxpr"], wanted)
        case "cond":
            branches = [_find_used(jaxpr, wanted) for jaxpr in p["branches"]]
            return [True, *map(any, zip(*branches, strict=True))]
        case "scan":
            return _find_used_in_loop(p["jaxpr"], wanted, *scan_counts(p))
        case "while":
            n = p["cond_nconsts"]
            tested = _find_used(p["cond_jaxpr"], [True])
            carry = list(map(max, wanted, tested[n:]))
            count = p["body_nconsts"], len(carry)
            return tested[:n] + _find_used_in_loop(p["body_jaxpr"], carry, *count)
    # All of them: of a custom_vjp, say, only the derivative may use an operand.
    return [True] * len(eqn.invars)


def _find_used_in_loop(body: Any, wanted: list[bool], n_consts: int, n_carry: int) -> list[bool]:
    """Finds the operands of a loop that its wanted outputs depend on, over all iterations."""
    used = _find_used(body, wanted)
    end = n_consts + n_carry
    carry = list(map(max, wanted[:n_carry], used[n_consts:end]))
    if carry == wanted[:n_carry]:
        return used[:n_consts] + carry + used[end:]
    return _find_used_in_loop(body, carry + wanted[n_carry:], n_consts, n_carry)


def find_sites(
    apply_fn: Callable[..., Any], rules: Sequence[Rule], call: Arguments
) -> tuple[Sites, Traced]:
    """Traces a call of `apply_fn` on shapes, and finds how it uses each leaf of the parameters.

    If Python code of `apply_fn` reads the value of a leaf, only the leaves that a rule other than
    `Full` and `Frozen` may match are traced; the other leaves are not listed as sites.
    """
    refuse_module(call[0], "params")
    leaves = leaves_by_path(call[0])
    types = {path: _type(x, path) for path, x in leaves}
    matrices = {
        path for path, x in types.items() if x.ndim >= 2 and jnp.issubdtype(x.dtype, jnp.floating)
    }
    taken: dict[Path, Rule] = {}
    for i, path in itertools.product(precedence(rules), types):
        if rules[i].pattern is None or matches(rules[i], "/".join(path)):
            taken.setdefault(path, rules[i])
    full = {path for path, rule in taken.items() if isinstance(rule, Full)}
    try:
        traced = _trace(apply_fn, call, types, matrices | full)
    except ValueReadError:
        fixed = {path for path, rule in taken.items() if isinstance(rule, Full | Frozen)}
        matrices = (matrices - fixed).intersection(taken)
        traced = _trace(apply_fn, call, types, matrices)
    used = traced.used
    uses = traced.uses({path for path in matrices if used.get(path)})
    sites = (_site(path, x, types[path], uses, used.get(path)) for path, x in leaves)
    return Sites(tuple(sites)), traced


def _trace(
    apply_fn: Callable[..., Any],
    call: Arguments,
    types: Mapping[Path, jax.ShapeDtypeStruct],
    paths: set[Path],
) -> Traced:
    """Traces the model as a function of the leaves at `paths` and of everything abstract."""
    params, *others = call
    flat, tree = flatten(params)
    leaves = [
        t if path in paths or is_abstract(x) or is_quantized(x) else x
        for (path, t), x in zip(types.items(), flat, strict=True)
    ]
    others = jax.tree.map(lambda x: abstract(x) if is_abstract(x) else x, others)
    picked, put = pick((jax.tree.unflatten(tree, leaves), *others), is_abstract)

    def apply(*values: Any) -> Any:
        params, args, kwargs = put(values)
        check = check_kept(params)
        with note_call(apply_fn, params):
            outputs = apply_fn(params, *args, **kwargs)
        check()
        return outputs

    read = [(path, x) for path, t, x in zip(types, leaves, flat, strict=True) if is_abstract(t)]
    # Tracing is faster at arrays than at their types.
    given = [x if isinstance(x, np.ndarray) else t for (_, x), t in zip(read, picked, strict=False)]
    specs = [*given, *picked[len(given) :]]
    jaxpr, _ = trace(apply, specs, ["/".join(path) for path in paths])
    return Traced(jaxpr, picked, [path for path, _ in read])


def _type(x: object, path: Path) -> jax.ShapeDtypeStruct:
    if is_quantized(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    check_leaf(x, path)
    is_typed = isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
    return abstract(x if is_typed else jnp.asarray(x))


def _site(path: Path, leaf: object, x: jax.ShapeDtypeStruct, uses: Uses, used: bool | None) -> Site:
    """Makes the site of a leaf of the type `x` from its uses."""
    name = "/".join(path)
    scheme = leaf.scheme if is_quantized(leaf) else None
    products, unsupported = uses.products[name], uses.unsupported[name]
    # A tied embedding has the layout of its lookup: A has its rows.
    first = min(products, key=lambda u: ("embed", "conv", "dense").index(u.kind), default=None)
    layout = first and _layout(first.inputs, first.outputs, x.shape)
    kind, expert, formed = None, None, None
    if first and layout:
        kind = first.kind
        experts = [d for d in layout.stack if d in first.batch] or layout.stack
        expert = experts[0] if len(experts) == 1 else None
    elif first:
        lost = "products that leave it no inputs or no outputs"
        unsupported = [*unsupported, Unsupported(lost, ())]
    if unsupported:
        *rest, last = range(x.ndim)
        found = (u.axes for u in unsupported if u.axes)
        each = (_layout(frozenset().union(*axes[:-1]), axes[-1], x.shape) for axes in found)
        formed = next(filter(None, each), Layout((), tuple(rest), (last,)))
    found = (tuple(unsupported), formed, used, scheme)
    layout = layout or Layout((), (), ())
    scopes = frozenset(uses.scopes[name])
    return Site(path, x.shape, x.dtype, kind, layout, expert, *found, scopes=scopes)


def _layout(
    contracted: frozenset[int], kept: frozenset[int], shape: tuple[int, ...]
) -> Layout | None:
    """Makes contracted axes the inputs, kept axes the outputs, and all others the stack."""
    inputs = [d for d in range(len(shape)) if d in contracted]
    outputs = [d for d in range(len(shape)) if d in kept - contracted]
    stack = [d for d in range(len(shape)) if d not in contracted | kept]
    # A reshape may lose track of an axis of length 1, which can have any role.
    for role in (inputs, outputs):
        if not role and (one := next((d for d in stack if shape[d] == 1), None)) is not None:
            stack.remove(one)
            role.append(one)
    if not outputs and not kept:  # the model contracts single vectors: their stack is the outputs
        outputs = stack
        stack = []
    is_matrix = inputs and outputs and all(shape[d] for d in inputs + outputs)
    return Layout(tuple(stack), tuple(inputs), tuple(outputs)) if is_matrix else None
