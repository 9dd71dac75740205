"""Calls of modules as functions of arrays: computed again in the backward pass, or in a scan."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch  # pyright: ignore[reportMissingImports]

from ._names import Stack
from ._private import count_writes, pytree
from ._stacks import NO_SCAN, describe, find_numbers, is_same
from .operators._refuse import refuse
from .operators._state import PLAIN
from .operators._tensor import Pending, Tensor, to_array, to_tensor

Arrays = Mapping[str, jax.Array]
ArrayLeaves = list[jax.Array | jax.ShapeDtypeStruct | None]  # None for what is static
WITHIN = 3  # in a scan, tensors have this as the number of their call


class Given(NamedTuple):
    """The arguments or outputs of a call.

    Attributes:
        leaves: tensors, and what is none.
        structure: the structure around them.
    """

    leaves: list[Any]
    structure: Any

    @classmethod
    def of(cls, tree: Any) -> "Given":
        """Flattens arguments or outputs; refuses what may hold tensors and is none."""
        leaves, structure = pytree.tree_flatten(tree)
        known = PLAIN | torch.Tensor | torch.dtype | torch.device
        if odd := [x for x in leaves if not isinstance(x, known)]:
            what = f"a {type(odd[0]).__name__} in a layer of `scan` or `remat`"
            refuse(f"gets or returns {what}", "Leave it out, as by use_cache=False.")
        return cls(leaves, structure)

    @property
    def arrays(self) -> ArrayLeaves:
        """The arrays in tensors that are traced; of tensors without values, their types."""
        return [_read(x) if isinstance(x, Tensor) else None for x in self.leaves]

    @property
    def call(self) -> int:
        """The number of the call of the model that the tensors belong to."""
        return max((getattr(x, "call", 0) for x in self.leaves), default=0)

    def with_tensors(self, tensors: Sequence[torch.Tensor | None]) -> Any:
        """Returns the tree with other tensors."""
        pairs = zip(tensors, self.leaves, strict=True)
        leaves = [y if x is None else x for x, y in pairs]
        return pytree.tree_unflatten(leaves, self.structure)


def _count_writes(x: torch.Tensor) -> int:
    return x.memory.writes if isinstance(x, Tensor) else count_writes(x)


def _read(x: Tensor) -> Any:
    return x.memory.type if isinstance(x.memory, Pending) else to_array(x)


class Module:
    """A module whose calls are functions of arrays.

    Attributes:
        module: the module.
        out: what its last call has returned.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        call: Callable[["Module", Given], Any],
    ) -> None:
        """Gives `module` a class of its own, whose calls are those of `call`."""
        self.module = module
        self.is_running = False
        own = type(module)

        def __call__(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
            if self.is_running:
                return own.__call__(module, *args, **kwargs)
            return call(self, Given.of((args, kwargs)))

        module.__class__ = type(own.__name__, (own,), {"__call__": __call__})

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its parameters and buffers, by name."""
        return dict((*self.module.named_parameters(), *self.module.named_buffers()))

    def wrap(self, arrays: ArrayLeaves, like: Given, call: int) -> Any:
        """Makes tensors of arrays, in place of those in `like`, for a call of the model."""
        found = list[Any]()
        for x, old in zip(arrays, like.leaves, strict=True):
            is_static = x is None and isinstance(old, torch.Tensor)
            new = old.detach() if is_static else None if x is None else to_tensor(x)
            if new is not None:
                new.call = call
            found.append(new)
        return like.with_tensors(found)

    def compute(self, given: Given, params: Arrays, arrays: ArrayLeaves, call: int) -> ArrayLeaves:
        """Computes the arrays of `out`; raises if the module writes into its arguments."""
        wrapped = {name: to_tensor(x) for name, x in params.items()}
        args, kwargs = self.wrap(arrays, given, call)
        before = pytree.tree_leaves((args, kwargs))
        every = [x for x in (*before, *wrapped.values()) if isinstance(x, torch.Tensor)]
        writes = list(map(_count_writes, every))
        self.is_running = True
        try:
            out = torch.func.functional_call(self.module, wrapped, args, kwargs)
        finally:
            self.is_running = False
        after, structure = pytree.tree_flatten((args, kwargs))
        same = structure == given.structure and all(map(operator.is_, before, after))
        if not same or writes != list(map(_count_writes, every)):
            refuse("writes into its arguments in `scan` or `remat`", "Leave it out of them.")
        self.out = Given.of(out)
        return self.out.arrays


def recompute(module: torch.nn.Module, policy: Any) -> None:
    """Has the calls of a module computed again in the backward pass, by `jax.checkpoint`."""

    def call(own: Module, given: Given) -> Any:
        run = jax.checkpoint(lambda *xs: own.compute(given, *xs, given.call), policy=policy)
        found = run({name: to_array(x) for name, x in own.tensors.items()}, given.arrays)
        return own.wrap(found, own.out, given.call)

    Module(module, call)


# ------------------------------------------------------------------------------------- scans


class Number:
    """An attribute that counts layers. In a scan it may be passed on, but has no value."""

    def __init__(self, name: str) -> None:
        """Holds the name of the attribute."""
        self.name = name

    def _refuse(self, *_: Any) -> Any:
        refuse(f"uses its {self.name}, which differs in the layers of a scan", NO_SCAN)

    __class__: Any = property(lambda self: int)  # for `isinstance`
    __bool__ = __int__ = __index__ = __float__ = __hash__ = __eq__ = __neg__ = _refuse
    __str__ = __format__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __add__ = __radd__ = __sub__ = __rsub__ = _refuse
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __floordiv__ = __mod__ = __pow__ = _refuse


class Noted(NamedTuple):
    """The call of a layer, before the scan.

    Attributes:
        given: its arguments.
        sources: which output of the layer before each of them is; None if it is none.
        has_gradients: whether it is called outside of `no_grad`.
    """

    given: Given
    sources: list[int | None]
    has_gradients: bool


class Scan:
    """The calls of the layers of a stack, all of which run when the last one is called."""

    def __init__(self, stack: Stack, model: torch.nn.Module) -> None:
        """Takes a model that runs no more than once at a time."""
        self.stack = stack
        layers = model.get_submodule(stack.name)[stack.start : stack.stop]
        for one, other in zip(layers[: stack.period], layers[stack.period :], strict=False):
            for name in find_numbers(describe(one), describe(other)):
                owner, _, key = name.rpartition(".")
                vars(one.get_submodule(owner))[key] = Number(key)
        self.layers = [
            Module(x, lambda own, given, i=i: self._note(i, own, given))
            for i, x in enumerate(layers)
        ]
        self._calls: list[Noted] = []
        self._last: list[Any] = []  # what the layer before has returned

    def _note(self, number: int, layer: Module, given: Given) -> Any:
        """Returns tensors without values; of the last layer, what all layers compute."""
        if number != len(self._calls):
            refuse(f"is called as number {len(self._calls)} of the layers in `scan`", NO_SCAN)
        sources = list(map(self._find, given.leaves))
        self._calls.append(Noted(given, sources, torch.is_grad_enabled()))
        kind = self.layers[number % self.stack.period]
        if kind is layer:
            jax.eval_shape(self._shape, *_split(layer), given.arrays)
        else:
            self._check(number)
        call = max(noted.given.call for noted in self._calls)
        self._last = [_wait(x, call) for x in kind.out.leaves]
        if number < len(self.layers) - 1:
            return kind.out.with_tensors(self._last)
        found = self._run()
        tensors = [found.get(k, x) for k, x in enumerate(self._last)]
        for x in found.values():
            x.call = call
        self._calls, self._last = [], []
        return kind.out.with_tensors(tensors)

    def _find(self, x: Any) -> int | None:
        """Finds which output of the layer before an argument is."""
        if not isinstance(x, Tensor) or not isinstance(x.memory, Pending):
            return None
        found = next((k for k, y in enumerate(self._last) if y is x), None)
        if found is None:
            refuse("gives a layer in `scan` what is no output of the one before", NO_SCAN)
        return found

    def _check(self, number: int) -> None:
        """Raises unless a layer gets what the same one of the step before has got."""
        period = self.stack.period
        one, other = self._calls[number - period], self._calls[number]
        same = (
            one.has_gradients == other.has_gradients
            and one.given.structure == other.given.structure
            and all(
                (isinstance(x, Tensor) and isinstance(y, Tensor)) or is_same(x, y)
                for x, y in zip(one.given.leaves, other.given.leaves, strict=True)
            )
        )
        # The first step has its inputs where the others have the outputs of the step before.
        if not same or (number > period and one.sources != other.sources):
            refuse(f"gives layer {number} in `scan` other arguments than those before", NO_SCAN)

    def _shape(self, stacked: Arrays, single: Arrays, arrays: ArrayLeaves) -> ArrayLeaves:
        """Computes what a layer of the first step returns."""
        first = {name: x[0] for name, x in stacked.items()}
        return self._compute(len(self._calls) - 1, {**single, **first}, arrays)

    def _compute(self, kind: int, params: Arrays, arrays: ArrayLeaves) -> ArrayLeaves:
        given, _, has_gradients = self._calls[kind]
        with torch.set_grad_enabled(has_gradients):
            return self.layers[kind].compute(given, params, arrays, WITHIN)

    def _run(self) -> dict[int, Tensor]:
        """Computes all layers; returns what the last one hands on, by its number there."""
        period = self.stack.period
        first, last = self._calls[:period], self._last
        carried = {at: k for at, k in enumerate(self._calls[period].sources) if k is not None}
        start = {at: to_array(first[0].given.leaves[at]) for at in carried}
        for at, k in carried.items():
            like = last[k].memory.type
            if (start[at].shape, start[at].dtype) != (like.shape, like.dtype):
                refuse(f"gets {jax.typeof(start[at])} in `scan`, and hands on {like}", NO_SCAN)
        stacked, single = zip(*map(_split, self.layers[:period]), strict=True)
        inputs = [self._gather(kind, {} if kind else carried) for kind in range(period)]
        varying, same = zip(*inputs, strict=True)

        def step(carry: dict[int, Any], x: Any) -> tuple[dict[int, Any], None]:
            out: ArrayLeaves = []
            for kind, (given, sources, _) in enumerate(first):
                known = same[kind] | x[1][kind] | ({} if kind else carry)
                known |= {at: out[k] for at, k in enumerate(sources) if k is not None}
                arrays = [known.get(at) for at in range(len(given.leaves))]
                out = self._compute(kind, {**single[kind], **x[0][kind]}, arrays)
            return {at: out[k] for at, k in carried.items()}, None

        end, _ = jax.lax.scan(step, start, (stacked, varying), length=self.stack.steps)
        return {carried[at]: to_tensor(x) for at, x in end.items()}

    def _gather(self, kind: int, carried: Mapping[int, int]) -> tuple[dict[int, Any], ...]:
        """Returns the arguments of a layer that differ in the steps, stacked, and the others."""
        each = self._calls[kind :: self.stack.period]
        varying, same = dict[int, Any](), dict[int, Any]()
        for at, (x, k) in enumerate(zip(each[0].given.leaves, each[0].sources, strict=True)):
            if isinstance(x, Tensor) and k is None and at not in carried:
                every = [noted.given.leaves[at] for noted in each]
                if all(y is x for y in every):
                    same[at] = to_array(x)
                else:
                    varying[at] = jnp.stack(list(map(to_array, every)))
        return varying, same


def _split(layer: Module) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns the tensors of a layer that are stacked, and the others."""
    stacked, single = dict[str, jax.Array](), dict[str, jax.Array]()
    for name, x in layer.tensors.items():
        is_stacked = isinstance(x.memory, Pending)
        (stacked if is_stacked else single)[name] = x.memory.value if is_stacked else to_array(x)
    return stacked, single


def _wait(x: Any, call: int) -> Any:
    """Makes a tensor like `x`, without values; None of what is no tensor."""
    if not isinstance(x, Tensor):
        return None
    like = jax.ShapeDtypeStruct(x.memory.type.shape, x.memory.type.dtype)
    does = "uses what a layer in `scan` returns before all layers have run"
    found = Tensor(Pending(like, does))
    found.call = call
    return found
