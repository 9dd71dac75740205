"""The data that everyone passes: paths, the `Layout` of a weight, base and adapter as `Params`."""

from typing import Any, ClassVar, NamedTuple, NoReturn

PyTree = Any  # a tree of arrays or of other leaves
Path = tuple[str, ...]  # of a leaf, component by component


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

    @property
    def of_entry(self) -> "Layout":
        """The layout of one entry along the first axis, which must be an axis of the stack."""
        stack, inputs, outputs = (tuple(d - 1 for d in axes if d) for axes in self[:3])
        slots = self.slots and (*self.slots[:2], self.slots[2] - 1)
        return Layout(stack, inputs, outputs, slots)


def short(x: object) -> str:
    """Writes an array as its dtype and shape, as JAX's messages do; other objects as `repr`."""
    dtype, shape = getattr(x, "dtype", None), getattr(x, "shape", None)
    return repr(x) if dtype is None or shape is None else f"{dtype}[{','.join(map(str, shape))}]"


class NotAnArray:
    """Stands in for a weight but is not an array: code that uses it as one gets an error."""

    _remedy: ClassVar[str]  # what errors say

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(self._remedy)

    # What JAX, NumPy, Flax and models first do with an array.
    __jax_array__ = __array__ = __getitem__ = __neg__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __matmul__ = __rmatmul__ = astype = reshape = _refuse

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}: {self._remedy}")


class Holder:
    """A model that holds its adapter itself: the modules of `jlora.nnx` and `jlora.keras`."""

    @property
    def adapter(self) -> PyTree:
        """The adapter as a tree of arrays, for all other functions of jlora."""
        raise NotImplementedError

    def find_state(self) -> list[str]:
        """Lists variables of the base that are not trained, but that calls may change."""
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
