"""What PyTorch computes, in float32 and in float64, beside what `apply` does."""

import copy
import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from .. import peft
from .._errors import InputError
from .._progress import progress
from .._text import format_bytes
from .._transform import wrap
from .._tree import bind, leaves_by_path
from .._types import PyTree
from ._apply import Apply, convert, is_static, record_outputs
from ._differences import (
    ADAPTED,
    AGAIN,
    CLOSE,
    GRADIENT,
    OUTPUT,
    UNKNOWN,
    ByPath,
    Difference,
    Results,
    judge,
)
from ._names import NOT_EXTRACTED
from ._skeleton import check_module
from ._stacks import stack_arrays

ULPS = 8  # of 16 bits, where PyTorch computes nothing in float64
Run = Callable[[torch.nn.Module], Results]


class Judge:
    """A module, and the function of its parameters, with the arguments of one call."""

    def __init__(
        self, model: torch.nn.Module, params: PyTree, apply: Any, call: Any, rows: int | None
    ) -> None:
        """Checks the module."""
        check_module(model)
        if not isinstance(apply, Apply):
            raise TypeError(f"{NOT_EXTRACTED}; got {type(apply).__name__}.")
        if any(x.is_meta for x in model.parameters()):
            why = "is on PyTorch's meta device, and computes nothing."
            remedy = "Compare a smaller model of the same class, with values."
            raise InputError("model", why, remedy=remedy)
        self.model, self.params, self.apply = model, params, apply
        self.method = call[1].pop("method", "forward")
        leaves, self.structure = jax.tree.flatten(call)
        self.leaves = _take(leaves, rows)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def compare(
        self, has_gradients: bool, adapter: PyTree | None, names: Sequence[peft.Name]
    ) -> tuple[list[Difference], str]:
        """Returns what differs, of the first kind that does, and the first module."""
        size = sum(x.numel() * x.element_size() for x in self.model.parameters())
        backward = f", a backward pass with {format_bytes(size)} of gradients" * has_gradients
        wide = f"where they differ, the same in float64, with {format_bytes(2 * size)} of weights"
        text = f"compare: two calls of PyTorch{backward} on the host; {wide}"
        progress.write(text, file=sys.stderr)
        model = _share(self.model)
        run = functools.partial(self._run, has_gradients)
        theirs = run(model)
        second = _read({AGAIN: self._call(model)})
        if found := judge({AGAIN: theirs[OUTPUT]}, second, dict, CLOSE):
            return found, ""
        ours = self._compile(functools.partial(self._compute, has_gradients), self.params)
        if found := self._judge(ours, theirs, run):
            return found, self._find_module() if found[0].what == OUTPUT else ""
        return ([] if adapter is None else self._compare_adapted(adapter, names)), ""

    def _run(self, has_gradients: bool, model: torch.nn.Module) -> Results:
        """Returns the outputs of a copy of the module, and gradients for random signs."""
        every = model.named_parameters() if has_gradients else ()
        floats = ((k, x) for k, x in every if x.is_floating_point() or x.is_complex())
        trained = {k: x.requires_grad_() for k, x in floats}
        outs = self._call(model)
        if not trained:
            return _read({OUTPUT: outs})
        known = {k: x for k, x in outs.items() if x.requires_grad}
        signs = [torch.tensor(np.asarray(x)) for k, x in _draw_signs(outs).items() if k in known]
        given = [x.to(y) for x, y in zip(signs, known.values(), strict=True)]
        options = {"allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad([*known.values()], [*trained.values()], given, **options)
        found = _read({OUTPUT: outs, GRADIENT: dict(zip(trained, grads, strict=True))})
        stacks = self.apply.structure.stacks
        return {OUTPUT: found[OUTPUT], GRADIENT: stack_arrays(found[GRADIENT], stacks)}

    def _compute(self, has_gradients: bool, params: PyTree, *call: Any) -> Results:
        """Returns the outputs of `apply`, and gradients for the same signs."""

        def weigh(params: PyTree) -> tuple[Any, Any]:
            outs = self._apply(params, *call)
            signs = _draw_signs(outs)
            terms = ((x.real.astype(jnp.float32) * signs[k]).sum() for k, x in outs.items())
            return sum(terms, jnp.zeros(())), outs

        if not has_gradients:
            return {OUTPUT: self._apply(params, *call)}
        grads, outs = jax.grad(weigh, has_aux=True, allow_int=True)(params)
        # Those of JAX are the conjugates of PyTorch's.
        named = {
            ".".join(p): x.conj() for p, x in leaves_by_path(grads) if x.dtype != jax.dtypes.float0
        }
        return {OUTPUT: outs, GRADIENT: named}

    def _compare_adapted(self, adapter: PyTree, names: Sequence[peft.Name]) -> list[Difference]:
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

            def run(model: torch.nn.Module) -> Results:
                adapted = PeftModel.from_pretrained(model, f"{folder}/adapter").eval()
                adapted = adapted.double() if _is_wide(model) else adapted
                return _read({ADAPTED: self._call(adapted)})

            return self._judge({ADAPTED: ours}, run(_share(self.model)), run)

    def _find_module(self) -> str:
        """Finds the first module, in the order of calls, whose output differs."""

        def compute(params: PyTree, args: Any, kwargs: Any) -> Results:
            seen = dict[str, Any]()
            self.apply.run(params, args, kwargs, self.method, seen)
            return {OUTPUT: seen}

        def run(model: torch.nn.Module) -> Results:
            seen = dict[str, Any]()
            record_outputs(model, self.apply.inside, seen, lambda x: x.detach().clone())
            self._call(model)
            return _read({OUTPUT: seen})

        found = self._judge(self._compile(compute, self.params), run(_share(self.model)), run)
        keys = [x.where.split(" ") for x in found]
        if not keys:
            return ""
        name = min(keys, key=lambda key: int(key[0]))[1]
        return f"{name or 'the root'} ({type(self.model.get_submodule(name)).__name__})"

    # ------------------------------------------------------------------------------ both sides

    def _apply(self, params: PyTree, args: Any, kwargs: Any) -> dict[str, Any]:
        return _flatten(self.apply.run(params, args, kwargs, self.method))

    def _compile(self, f: Callable[..., Any], params: PyTree) -> Any:
        """Compiles and calls a function of parameters and of the arguments."""
        traced = {i: x for i, x in enumerate(self.leaves) if not is_static(x)}

        def call(params: PyTree, traced: dict[int, Any]) -> Any:
            leaves = [traced.get(i, x) for i, x in enumerate(self.leaves)]
            return f(params, *self.structure.unflatten(leaves))

        return jax.jit(call)(params, traced)

    def _call(self, model: torch.nn.Module) -> dict[str, Any]:
        leaves = [_to_torch(x, _is_wide(model)) for x in self.leaves]  # which the call may change
        args, kwargs = self.structure.unflatten(leaves)
        call = model if self.method == "forward" else getattr(model, self.method)
        return _flatten(convert(call(*args, **kwargs), lambda x, _: x))

    def _judge(self, ours: Results, theirs: Results, run: Run) -> list[Difference]:
        trained = {k: x for k, x in ours.get(GRADIENT, {}).items() if k in theirs.get(GRADIENT, {})}
        dtypes = [x.dtype for x in self.model.parameters() if x.is_floating_point()]
        unknown = max([UNKNOWN, *(ULPS * torch.finfo(x).eps for x in dtypes)])
        known = {**ours, GRADIENT: trained}
        return judge(known, theirs, lambda: run(_share(self.model).double()), unknown)


def _flatten(outputs: Any) -> dict[str, Any]:
    """Lists the arrays and tensors of outputs by path."""
    leaves = jax.tree_util.tree_leaves_with_path(outputs)
    kinds = torch.Tensor | jax.Array
    return {jax.tree_util.keystr(path): x for path, x in leaves if isinstance(x, kinds)}


def _draw_signs(outputs: ByPath) -> dict[str, jax.Array]:
    """Draws a cotangent, which every dtype holds."""
    keys = jax.random.split(jax.random.key(0), max(1, len(outputs)))
    draw = functools.partial(jax.random.rademacher, dtype=jnp.float32)
    pairs = zip(outputs.items(), keys, strict=False)
    return {k: draw(key, tuple(x.shape)) for (k, x), key in pairs}


def _read(results: Results) -> dict[str, Any]:
    """Copies tensors to NumPy, which has no bfloat16."""
    return jax.tree.map(
        lambda x: (x.float() if x.dtype is torch.bfloat16 else x).numpy(force=True).copy(), results
    )


def _is_wide(model: torch.nn.Module) -> bool:
    return any(x.dtype == torch.float64 for x in model.parameters())


def _take(leaves: list[Any], rows: int | None) -> list[Any]:
    """Takes the first rows of all arrays that have as many as the first."""
    kinds = jax.Array | np.ndarray | torch.Tensor
    sizes = [x.shape[:1] if isinstance(x, kinds) else () for x in leaves]
    first = next(filter(None, sizes), None)
    return [x[:rows] if n == first else x for x, n in zip(leaves, sizes, strict=True)]


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
