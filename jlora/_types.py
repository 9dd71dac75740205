"""The trees: the `Layout` of a weight, bound leaves, and the combined `Params`."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, NoReturn

import jax

from ._rules import Rule, rule_name

PyTree = Any
Path = tuple[str, ...]


class Layout(NamedTuple):
    """What the model does with each axis of a weight W.

    Attributes:
        stack: axes over which W is a stack of independent matrices (scanned layers, experts).
        inputs: axes that the model contracts with its activations.
        outputs: axes that the product keeps.
        slots: None, or `(count, chosen, axis)`: W's axis `axis` has `count` equal parts, of which
            the parts `chosen` are adapted, each with its own A and B.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> attention = lambda params, x: jnp.einsum("bi,ihd->bhd", x, params["query"])
        >>> params = {"query": jnp.ones((4, 2, 3))}
        >>> jlora.transform(attention).sites(params, jnp.ones((1, 4)))["query"].layout
        Layout(stack=(), inputs=(0,), outputs=(1, 2), slots=None)
    """

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    slots: tuple[int, tuple[int, ...], int] | None = None


def short(x: Any) -> str:
    """Writes an array as its dtype and shape, as JAX's messages do; other objects as `repr`."""
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        return repr(x)
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


class NotAnArray:
    """Stands in for a weight but is not an array: code that uses it as one gets an error."""

    _remedy: ClassVar[str]  # what errors say

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(self._remedy)

    # What JAX, NumPy, Flax and models first do with an array.
    __jax_array__ = __array__ = __getitem__ = __neg__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __matmul__ = __rmatmul__ = astype = reshape = _refuse

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}: {self._remedy}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted(NotAnArray):
    """A leaf of a bound tree: the frozen weight and its adapter. It is not an array.

    Attributes:
        base: W.
        delta: the node of its adapter, such as a `LowRank`.
    """

    base: jax.Array
    delta: Any

    _remedy: ClassVar = (
        "`params` is a tree from jlora.bind, which holds adapters beside its weights. Only "
        "functions under jlora.wrap accept it: call jlora.wrap(model.apply)(params, ...) instead "
        "of model.apply(params, ...), or lora.apply(base, adapter, ...)."
    )

    def __repr__(self) -> str:
        return f"Adapted(base={short(self.base)}, delta={self.delta!r})"


class Holder:
    """A model that holds its adapter itself: the modules of `jlora.nnx` and `jlora.keras`."""

    @property
    def adapter(self) -> PyTree:
        """The adapter as a tree of arrays, for all other functions of jlora."""
        raise NotImplementedError


class Params(NamedTuple):
    """Base and adapter in one tree, for code that holds one tree, such as Flax's `TrainState`.

    Attributes:
        base: the frozen tree.
        adapter: the trainable tree.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> jlora.labels(jlora.Params(base={"w": jnp.ones((4, 3))}, adapter={}))
        Params(base={'w': 'base'}, adapter={})
    """

    base: PyTree
    adapter: PyTree


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
    sites: Callable[..., Any]
    apply_fn: Callable[..., Any]
    rules: tuple[Rule, ...]

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter((self.init, self.apply, self.sites))

    def __repr__(self) -> str:
        listed = "".join(f", {rule_name(rule)}" for rule in self.rules)
        return f"Transformed({function_name(self.apply_fn)}{listed})"


def function_name(fn: Any) -> str:
    """Returns the name of a function for messages; a method has the name of its type before it."""
    if isinstance(fn, functools.partial):
        return f"partial({function_name(fn.func)})"
    if inspect.ismethod(fn):
        return f"{type(fn.__self__).__name__}.{fn.__name__}"
    return getattr(fn, "__name__", type(fn).__name__)
