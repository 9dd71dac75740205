"""What PyTorch computes, in float32 and in float64, beside what `apply` does."""

import copy
import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from .. import peft
from .._errors import InputError
from .._transform import wrap
from .._tree import bind, leaves_by_path
from .._types import PyTree
from ._apply import Apply, convert, is_static, record_outputs
from ._differences import Difference
from ._skeleton import check_module
from ._stacks import stack_arrays

CLOSE, TIMES = 1e-5, 4.0  # of the largest entry; of PyTorch's own error
LEAST = 1e-3  # of the largest entry of all arrays: errors of smaller ones are relative to it
UNKNOWN, ULPS = 1e-3, 8  # where PyTorch computes nothing in float64

Arrays = Mapping[str, Any]  # by path


class Judge:
    """A module, and the function of its parameters, with the arguments of one call."""

    def __init__(
        self, model: torch.nn.Module, params: PyTree, apply: Any, args: Any, kwargs: Any
    ) -> None:
        """Checks the module."""
        check_module(model)
        if not isinstance(apply, Apply):
            why = "must be the function that jlora.torch.extract returned, or a partial of it"
            raise TypeError(f"`apply` {why}; got {type(apply).__name__}.")
        if any(x.is_meta for x in model.parameters()):
            why = "is on PyTorch's meta device, and computes nothing."
            remedy = "Compare a smaller model of the same class, with values."
            raise InputError("model", why, remedy=remedy)
        self.model, self.params, self.apply = model, params, apply
        self.method = kwargs.pop("method", "forward")
        self.leaves, self.structure = jax.tree.flatten((args, kwargs))
        dtypes = [x.dtype for x in model.parameters() if x.is_floating_point()]
        self.unknown = max([UNKNOWN, *(ULPS * torch.finfo(x).eps for x in dtypes)])

    @torch.inference_mode(False)
    @torch.enable_grad()
    def compare(
        self, gradients: bool, adapter: PyTree | None, names: Sequence[peft.Name]
    ) -> tuple[list[Difference], str]:
        """Returns what differs, up to the first kind that does, and the first module."""
        if found := list(self._compare_outputs()):
            return found, self._find_module()
        if gradients:
            found = list(self._compare_gradients())
        if adapter is not None and not found:
            found = list(self._compare_adapted(adapter, names))
        return found, ""

    def _compare_outputs(self) -> Iterator[Difference]:
        """Compares the outputs, and those of PyTorch's second call with those of its first."""
        yield from self._judge("output", self._compile(self._apply, self.params), self._run)
        model = _share(self.model)
        first, second = (self._run(model) for _ in range(2))
        yield from self._judge("output of call 2", lambda: first, lambda _: second)

    def _compare_gradients(self) -> Iterator[Difference]:
        """Compares the gradients of all parameters, for a random cotangent."""
        weights = dict[str, np.ndarray]()
        stacks = self.apply.structure.stacks

        def run(model: torch.nn.Module) -> Arrays:
            trained = {k: x for k, x in model.named_parameters() if x.is_floating_point()}
            for x in trained.values():
                x.requires_grad_()
            outs = {k: x for k, x in self._call(model).items() if getattr(x, "grad_fn", None)}
            draw = np.random.default_rng(0).standard_normal
            weights.update({k: draw(x.shape).astype(np.float32) for k, x in outs.items()})
            given = [torch.tensor(weights[k]).to(x) for k, x in outs.items()]
            options = {"allow_unused": True, "materialize_grads": True}
            grads = torch.autograd.grad(tuple(outs.values()), [*trained.values()], given, **options)
            return stack_arrays(_read(dict(zip(trained, grads, strict=True))), stacks)

        def loss(params: PyTree, args: Any, kwargs: Any) -> Any:
            out = self._apply(params, args, kwargs)
            return sum(((out[k].astype(x.dtype) * x).sum() for k, x in weights.items()), 0.0)

        def gradients(params: PyTree, args: Any, kwargs: Any) -> Arrays:
            found = jax.grad(loss, allow_int=True)(params, args, kwargs)
            return {".".join(path): x for path, x in leaves_by_path(found)}

        return self._judge("gradient", self._compile(gradients, self.params), run)

    def _compare_adapted(self, adapter: PyTree, names: Sequence[peft.Name]) -> Iterator[Difference]:
        """Compares the outputs with those of PEFT, which reads the file of an adapter."""
        try:
            from peft import PeftModel
        except ModuleNotFoundError as e:
            raise ImportError("`adapter` is compared with PEFT: pip install peft.") from e
        draw = functools.partial(jax.random.normal, jax.random.key(0))
        adapter = jax.tree.map(lambda x: x + 0.02 * draw(x.shape, x.dtype), adapter)
        ours = self._compile(wrap(self._apply), bind(self.params, adapter))
        with tempfile.TemporaryDirectory() as folder:
            peft.save(f"{folder}/adapter", self.params, adapter, names)

            def load(model: torch.nn.Module) -> torch.nn.Module:
                return PeftModel.from_pretrained(copy.deepcopy(model), f"{folder}/adapter").eval()

            yield from self._judge("adapted output", ours, self._run, load)

    def _find_module(self) -> str:
        """Finds the first module, in the order of calls, whose output differs."""

        def apply(params: PyTree, args: Any, kwargs: Any) -> Arrays:
            seen = dict[str, Any]()
            self.apply.run(params, args, kwargs, self.method, seen)
            return seen

        def run(model: torch.nn.Module) -> Arrays:
            seen = dict[str, Any]()
            record_outputs(model, self.apply.inside, seen, lambda x: x.detach().clone())
            self._call(model)
            return _read(seen)

        differ = self._judge("output", self._compile(apply, self.params), run)
        keys = [x.where.split(" ") for x in differ]
        if not keys:
            return ""
        name = min(keys, key=lambda key: int(key[0]))[1]
        return f"{name or 'the root'} ({type(self.model.get_submodule(name)).__name__})"

    # ------------------------------------------------------------------------------ both sides

    def _apply(self, params: PyTree, args: Any, kwargs: Any) -> Arrays:
        return _flatten(self.apply.run(params, args, kwargs, self.method))

    def _compile(self, f: Callable[..., Any], tree: PyTree) -> Callable[[], Any]:
        """Returns the compiled call of a function of a tree and of the arguments."""
        traced = {i: x for i, x in enumerate(self.leaves) if not is_static(x)}

        def call(tree: Any, traced: dict[int, Any]) -> Any:
            leaves = [traced.get(i, x) for i, x in enumerate(self.leaves)]
            return f(tree, *self.structure.unflatten(leaves))

        return functools.partial(jax.jit(call), tree, traced)

    def _call(self, model: torch.nn.Module) -> dict[str, Any]:
        """Calls a copy of the module; returns tensors."""
        is_wide = any(x.dtype == torch.float64 for x in model.parameters())
        leaves = [_to_torch(x, is_wide) for x in self.leaves]  # which the call may change
        args, kwargs = self.structure.unflatten(leaves)
        call = model if self.method == "forward" else getattr(model, self.method)
        return _flatten(convert(call(*args, **kwargs), lambda x, _: x))

    def _run(self, model: torch.nn.Module) -> Arrays:
        return _read(self._call(model))

    def _judge(
        self,
        what: str,
        compute: Callable[[], Arrays],
        run: Callable[[torch.nn.Module], Arrays],
        load: Callable[[torch.nn.Module], torch.nn.Module] | None = None,
    ) -> Iterator[Difference]:
        """Compares arrays with PyTorch's; where these differ, both with those of float64."""
        load = load or _share
        theirs = run(load(self.model))
        ours = {k: x for k, x in compute().items() if k in theirs or what != "gradient"}
        yield from (Difference(what, x, math.inf, 0.0) for x in ours.keys() ^ theirs.keys())
        least = LEAST * max(map(_measure, theirs.values()), default=0.0)
        wide = functools.cache(lambda: _try(run, load(self.model).double()))
        for key in (x for x in theirs if x in ours):
            x, y = ours[key], theirs[key]
            is_exact = y.dtype.kind in "biu"
            error = _find_error(x, y, least)
            bound = 0.0 if is_exact else CLOSE
            if bound < error < math.inf and not is_exact:
                bound = self.unknown
                if (z := wide()) is not None:
                    bound = max(CLOSE, TIMES * _find_error(y, z[key], least))
                    error = _find_error(x, z[key], least)
            if error > bound:
                yield Difference(what, key, error, bound)


def _try(run: Callable[[Any], Arrays], model: torch.nn.Module) -> Arrays | None:
    """Runs PyTorch in float64; None if some operator takes no such floats."""
    try:
        return run(model)
    except RuntimeError:
        return None


def _measure(x: Any) -> float:
    """Returns the size of the largest finite entry."""
    return float(np.abs(x[np.isfinite(x)].astype(complex)).max(initial=0))


def _find_error(x: Any, y: Any, least: float) -> float:
    """Returns the largest difference, relative to the largest entry of `y`, or to `least`."""
    x, y = (np.asarray(x).astype(complex) for x in (x, y))
    is_finite = np.isfinite(y)
    if x.shape != y.shape or not np.array_equal(x[~is_finite], y[~is_finite], equal_nan=True):
        return math.inf
    error = np.abs(x[is_finite] - y[is_finite]).max(initial=0)
    return math.inf if np.isnan(error) else float(error / max(_measure(y), least, 1e-30))


def _flatten(outputs: Any) -> dict[str, Any]:
    """Lists the arrays and tensors of outputs by path."""
    leaves = jax.tree_util.tree_leaves_with_path(outputs)
    kinds = torch.Tensor | jax.Array
    return {jax.tree_util.keystr(path): x for path, x in leaves if isinstance(x, kinds)}


def _read(tensors: Arrays) -> dict[str, np.ndarray]:
    """Copies tensors; NumPy has no bfloat16."""
    held = {k: x.detach().cpu() if torch.is_tensor(x) else x for k, x in tensors.items()}
    bfloat16 = torch.bfloat16, jnp.bfloat16
    return {k: np.array(x.float() if x.dtype in bfloat16 else x) for k, x in held.items()}


def _to_torch(x: Any, is_wide: bool) -> Any:
    """Makes a tensor of an array; integers get 64 bits, and floats if they are wide."""
    if isinstance(x, jax.Array | np.ndarray):
        one = jax.device_put(x, jax.devices("cpu")[0])
        x = torch.utils.dlpack.from_dlpack(one)
        x = x.long() if not x.is_floating_point() and x.dtype != torch.bool else x
    if not isinstance(x, torch.Tensor):
        return x
    return x.double() if is_wide and x.is_floating_point() else x.detach().clone()


def _share(model: torch.nn.Module) -> torch.nn.Module:
    """Copies a module without its parameters, which have the same memory."""
    memo = {id(x): torch.nn.Parameter(x.detach(), x.requires_grad) for x in model.parameters()}
    return copy.deepcopy(model, memo)
