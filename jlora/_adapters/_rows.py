r"""Chosen rows of an embedding, trained in full.

$$W' = W + E\,(V - W_{rows})$$

where the columns of E are the columns `rows` of the identity. It is a change of rank k, in lookups
and in a tied head. It adds 0 to all other rows.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from .._arrays import explicit, follow, promote, to_device
from .._core import RANK, Axis, Change, Delta, Factor, Weight, evaluate, leaf_weight
from .._errors import InputError, list_few
from .._node import SHOWN, Axes, Node, lengths
from .._quantized import BaseLeaf, Quantized
from .._rules import check_field, check_pattern, is_int, rule_name
from .._site import Rule, Site, check_whole
from .._types import Layout
from ._register import register


@register
class Replaced(Node):
    r"""One weight with new rows: $W' = W + E\,(V - W_{rows})$.

    A pytree node with the child `v`; the rest is static.

    Attributes:
        v: V, shape (stack…, k, outputs…). Its label for the optimizer is `"rows"`.
        rows: the indices of the rows, along the only input axis of W.
        layout: which axes of W are which.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> node = jlora.types.Replaced(jnp.ones((2, 3)), (7, 8), layout)
        >>> jlora.merge({"embed": jnp.zeros((9, 3))}, {"embed": node})["embed"][6:, 0].tolist()
        [0.0, 1.0, 1.0]
    """

    v: jax.Array
    rows: tuple[int, ...]
    layout: Layout

    labels: ClassVar = {"v": "rows"}
    is_invertible: ClassVar = False

    @staticmethod
    def axes(layout: Layout) -> Axes:
        """Returns what each axis of V follows."""
        return {"v": (*layout.stack, "rows", *layout.outputs)}

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Says why a table of `shape` cannot have these rows, or returns None."""
        if len(self.layout.inputs) != 1:
            return f"it must have one input axis, got {self.layout.inputs}"
        if wrong := _problem(self.rows):
            return f"its `rows` must be {wrong}"
        [axis] = self.layout.inputs
        k = lengths(self).get("rows", 0)
        if len(self.rows) != k:
            return f"it has {len(self.rows)} `rows` but values for {k}"
        # The length is 0 if only the adapter of the weight is known.
        if shape[axis] and (beyond := [i for i in self.rows if i >= shape[axis]]):
            return f"its `rows` must be in [0, {shape[axis]}); got {list_few(beyond, SHOWN)}"
        return None

    def needs(self) -> dict[str, tuple[int, ...]]:
        """Returns the axis of rows, whose indices are those of the whole table."""
        return {"Rows indexes the whole table": self.layout.inputs}

    def lower(self, w: jax.Array | Quantized) -> Change:
        """Returns the change that replaces the rows by V."""
        old = _take_rows(w, self.layout, self.rows)
        dtype = promote(w.dtype, self.v.dtype)
        b = self._replace(v=self.v.astype(dtype) - old.astype(dtype)).factor("v")
        return Change((Delta(_one_hot(self, w), b, 1.0),))


@register
@dataclasses.dataclass(frozen=True)
class Rows(Rule):
    r"""Trains chosen rows of an embedding in full, such as the rows of new tokens.

    Their values V, shape (stack…, k, outputs…), replace the rows wherever the model uses the table:
    in lookups and in a tied head. V starts as the rows themselves, in float32 or wider; no other
    row changes. Add rules for the rest of the model: `Rows("embed", new), LoRA()`.

    Attributes:
        pattern: a regular expression that matches whole components of a leaf's path.
        rows: the k indices of the rows, distinct, in any order: `range(49152, 49160)`.

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if `pattern` is not a regular expression, or an index is negative or there
            twice; in `init`, if the leaf is not an embedding, does not have the rows, or is a
            `jax.ShapeDtypeStruct`.
        NotImplementedError: in `init`, within a `shard_map` that may shard W.

    Source: PEFT's `trainable_token_indices`.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> new = jlora.transform(lambda p, ids: p["embed"][ids], jlora.Rows("embed", [4, 5]))
        >>> params = {"embed": jnp.arange(12.0).reshape(6, 2)}
        >>> base, adapter = new.init(jax.random.key(0), params, jnp.array([0]))
        >>> adapter
        {'embed': Replaced(v=float32[2,2], rows=(4, 5))}
        >>> adapter["embed"].v.tolist()
        [[8.0, 9.0], [10.0, 11.0]]
    """

    pattern: str
    rows: Sequence[int]

    node: ClassVar[type[Node]] = Replaced

    def __post_init__(self) -> None:
        check_pattern(self, self.pattern)
        is_list = isinstance(self.rows, Sequence) and not isinstance(self.rows, str)
        are_integers = is_list and all(map(is_int, self.rows))
        check_field(self, "rows", are_integers, "be a list of integers", TypeError)
        rows = tuple(map(int, self.rows))
        if wrong := _problem(rows):
            raise InputError("rows", f"of {rule_name(self)} must be {wrong}.")
        object.__setattr__(self, "rows", rows)

    def fit(self, site: Site) -> tuple["Rows", Layout]:
        """Returns the rule; raises unless the site is an embedding that has the rows."""
        if site.kind != "embed" or len(site.layout.inputs) != 1:
            raise ValueError(
                f"{rule_name(self)} needs an embedding, whose rows are looked up, but it matches "
                f"{site.name}, a {site.kind} site of shape {site.shape}. Narrow the pattern, or "
                "give the site a jlora.LoRA or a jlora.Full."
            )
        [axis] = site.layout.inputs
        if beyond := [i for i in self.rows if i >= site.shape[axis]]:
            raise InputError(
                "rows",
                f"of {rule_name(self)} must be in [0, {site.shape[axis]}), the rows of "
                f"{site.name}; got {list_few(beyond, SHOWN)}. For new tokens, enlarge the table "
                "first.",
            )
        return self, site.layout

    def sizes(self, layout: Layout) -> dict[str, int]:
        """Returns the number of rows."""
        del layout
        return {"rows": len(self.rows)}

    def start(self, key: jax.Array, w: BaseLeaf, site: Site) -> tuple[BaseLeaf, Replaced]:
        """Returns W and its node, with the rows of W as V."""
        del key
        whole = check_whole(f"{rule_name(self)} takes rows of", w, site.path)
        rows = tuple(self.rows)
        v = _take_rows(whole, site.layout, rows)
        return w, Replaced(v.astype(promote(v.dtype, jnp.float32)), rows, site.layout)


def _problem(rows: object) -> str | None:
    """Says what `rows` must be, and what they are instead; None if they are right."""
    if not isinstance(rows, tuple) or not all(map(is_int, rows)):
        return f"a tuple of integers; got {repr(rows)[:80]}"
    if not rows:
        return "at least one row"
    if negative := [i for i in rows if i < 0]:
        return f"counted from 0; got {list_few(negative, SHOWN)}"
    if twice := [i for i, n in collections.Counter(rows).items() if n > 1]:
        return f"distinct; got {list_few(twice, SHOWN)} more than once"
    return None


def _one_hot(node: Replaced, w: jax.Array | Quantized) -> Factor:
    """Makes the matrix E of ones and zeros for each matrix of a stack."""
    [axis], stack = node.layout.inputs, node.layout.stack
    rows = jnp.asarray(node.rows, jnp.int32)
    chosen = jax.nn.one_hot(rows, w.shape[axis], dtype=promote(w.dtype), axis=0)
    chosen = jnp.broadcast_to(chosen, (*(w.shape[d] for d in stack), *chosen.shape))
    if (known := explicit(w)) is not None:
        chosen = jax.sharding.reshard(chosen, follow(known, chosen, (*stack, axis, None)))
    return Factor(chosen, (*map(Axis, (*stack, axis)), RANK))


def _take_rows(w: jax.Array | Quantized, layout: Layout, rows: tuple[int, ...]) -> jax.Array:
    """Takes rows of W, with the axes of V; of a quantized W it unpacks no other rows if it can."""
    stack, [axis], outputs, _ = layout
    at = (*[slice(None)] * axis, jnp.asarray(rows, jnp.int32))
    weight = leaf_weight(to_device(w), Change(), "", materialize=True)
    known = explicit(w)
    place = known and follow(known, weight.type, [None if d == axis else d for d in range(w.ndim)])

    def take(w: jax.Array) -> jax.Array:
        return w.at[at].get(mode="promise_in_bounds", out_sharding=place)

    [found] = evaluate(jax.make_jaxpr(take)(weight.type), weight)
    found = found.array if isinstance(found, Weight) else found
    return found.transpose((*stack, axis, *outputs))
