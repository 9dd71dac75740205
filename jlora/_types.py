"""The trees: the `Layout` of a weight, bound leaves, and the combined `Params`."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, NoReturn

import jax

from ._rules import rule_name

PyTree = Any
Path = tuple[str, ...]


class Layout(NamedTuple):
    """What the model does with each axis of a weight W.

    Attributes:
        stack: axes over which W is a stack of independent matrices (scanned layers, experts).
        inputs: axes that the model contracts with its activations.
        outputs: axes that the product keeps.
        slots: `(count, chosen, axis)` where only the slots `chosen` of the `count` equal parts of
            W's axis `axis` are adapted, each with its own A and B; else None.
    """

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    slots: tuple[int, tuple[int, ...], int] | None = None


def short(x: Any) -> str:
    """Writes an array, or a stand-in, as its dtype and shape, as JAX's messages do."""
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        return repr(x)
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


class NotAnArray:
    """Stands in for a weight, and is no array: code that takes it for one gets an error."""

    _remedy: ClassVar[str]  # what errors say

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(self._remedy)

    # Where JAX, NumPy, Flax and models first take it for an array.
    __jax_array__ = __array__ = __getitem__ = __neg__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __matmul__ = __rmatmul__ = astype = reshape = _refuse

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}: {self._remedy}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted(NotAnArray):
    """A leaf of a bound tree: the frozen weight beside its adapter. It is no array.

    Attributes:
        base: W.
        delta: the node of its adapter, such as a `LowRank`.
    """

    base: jax.Array
    delta: Any

    _remedy: ClassVar = (
        "`params` is a tree from jlora.bind, with adapters beside its weights, which only a "
        "function under jlora.wrap takes: call jlora.wrap(model.apply)(params, ...) in the place "
        "of model.apply(params, ...), or lora.apply(base, adapter, ...)."
    )

    def __repr__(self) -> str:
        return f"Adapted(base={short(self.base)}, delta={self.delta!r})"


class Params(NamedTuple):
    """Base and adapter in one tree, for code that holds one, as Flax's `TrainState` does.

    Attributes:
        base: the frozen tree.
        adapter: the trainable tree.
    """

    base: PyTree
    adapter: PyTree


class Transformed(NamedTuple):
    """What `jlora.transform` returns: three pure functions.

    Attributes:
        init: `(key, params, *args, **kwargs) -> (base, adapter)`.
        apply: `(base, adapter, *args, **kwargs) -> outputs of the apply function`.
        sites: `(params, *args, **kwargs) -> Sites`. Where it is a `functools.partial` that begins
            with the apply function and the rules, `print` names those.
    """

    init: Callable[..., tuple[PyTree, PyTree]]
    apply: Callable[..., Any]
    sites: Callable[..., Any]

    def __repr__(self) -> str:
        if not isinstance(self.sites, functools.partial) or len(self.sites.args) < 2:
            return f"Transformed(init={self.init}, apply={self.apply}, sites={self.sites})"
        apply_fn, rules = self.sites.args[:2]
        listed = "".join(f", {rule_name(rule)}" for rule in rules)
        return f"Transformed({function_name(apply_fn)}{listed})"


def function_name(fn: Any) -> str:
    """Names a function for a message; a method with its type."""
    if isinstance(fn, functools.partial):
        return f"partial({function_name(fn.func)})"
    if inspect.ismethod(fn):
        return f"{type(fn.__self__).__name__}.{fn.__name__}"
    return getattr(fn, "__name__", type(fn).__name__)
