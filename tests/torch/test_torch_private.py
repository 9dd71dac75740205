"""What `jlora.torch` takes from PyTorch and torchax without their promise, name by name.

A row that fails says which version has changed what.
"""

import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jlora.torch._apply")

import torch
from torch import nn

from jlora.torch import _private as private

aten = torch.ops.aten


class Twice(torch.autograd.Function):
    """Has two outputs."""

    frame: Any = None

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps the frame around it."""
        frame = inspect.currentframe()
        while frame is not None and frame.f_code is not private.APPLY:
            frame = frame.f_back
        Twice.frame = frame
        return x * 2, x[0] * 3

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        """Sums."""
        return grads[0]


class Seen(private.TorchDispatchMode):
    """Notes operators, also of constants."""

    def __init__(self) -> None:
        """Has seen none."""
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes one."""
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


class Shell(torch.Tensor):
    """Has no memory."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Computes nothing."""
        return NotImplemented


def see(f: Callable[[], Any]) -> list[Any]:
    with Seen() as mode:
        f()
    return mode.operators


def within(context: Any, f: Callable[[], Any]) -> Any:
    with context:
        return f()


def batched() -> list[bool]:
    found = [private.is_batched(torch.ones(2))]
    torch.vmap(lambda x: (found.append(private.is_batched(x)), x)[1])(torch.ones(2))
    return found


def write() -> list[int]:
    x = torch.zeros(2)
    return [private.count_writes(x), private.count_writes(x.add_(1))]


def hook(add: Callable[[nn.Module], Any]) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    add(model)
    return model


def given(x: torch.Tensor) -> Any:
    Twice.apply(x)
    return Twice.frame.f_locals


class Made(nn.Linear):
    """Knows how to initialize."""

    def _init_weights(self, module: nn.Module) -> None:
        module.is_made = True


def initialized() -> bool:
    model = nn.Linear(1, 1)
    private.initialize(model, [nn.Linear(1, 1), Made(1, 1)])
    return model.is_made


X = torch.ones(2, 3, requires_grad=True)
PLAIN = hook(lambda m: None)
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.bool, torch.complex64
# By name: what is computed, and what it is.
CONTRACTS: dict[str, tuple[Callable[[], Any], Any]] = {
    "OPERATORS": (lambda: float(private.OPERATORS[aten.exp](jnp.zeros(()))), 1.0),
    "DECOMPOSITIONS": (
        lambda: private.DECOMPOSITIONS[aten.addcmul.default](X, X, X).tolist(),
        (X + X * X).tolist(),
    ),
    "find_jax_dtype": (
        lambda: [np.dtype(private.find_jax_dtype(x)).name for x in DTYPES],
        [str(x).removeprefix("torch.") for x in DTYPES],
    ),
    "find_torch_dtype": (
        lambda: [private.find_torch_dtype(private.find_jax_dtype(x)) for x in DTYPES],
        list(DTYPES),
    ),
    "pytree": (lambda: private.pytree.tree_leaves({"a": [1, (2,)]}), [1, 2]),
    "below_autograd": (lambda: within(private.below_autograd(), lambda: (X * 2).grad_fn), None),
    "is_batched": (batched, [False, True]),
    "NO_FUNCTION": (
        lambda: private.NO_FUNCTION(aten.neg.default, (), (torch.ones(1),)).tolist(),
        [-1.0],
    ),
    "APPLY": (lambda: [(x["cls"], *x["args"]) for x in [given(X)]], [(Twice, X)]),
    "OpOverload": (lambda: isinstance(aten.neg.default, private.OpOverload), True),
    "TorchDispatchMode": (lambda: see(lambda: torch.ones(2)), [aten.ones.default]),
    "no_modes": (lambda: see(lambda: within(private.no_modes(), lambda: torch.ones(2))), []),
    "is_composite": (
        lambda: [private.is_composite(x) for x in (aten.matmul.default, aten.mm.default)],
        [True, False],
    ),
    "name_operator": (lambda: private.name_operator(aten.add_.Tensor), "add_"),
    "list_written": (
        lambda: [private.list_written(x) for x in (aten.add.Tensor, aten.add_.Tensor)],
        [[], [(0, "self")]],
    ),
    "may_alias": (
        lambda: [private.may_alias(x) for x in (aten.view.default, aten.mm.default)],
        [True, False],
    ),
    "read_storage": (lambda: private.read_storage(X) == private.read_storage(X[0]), True),
    "make_wrapper": (
        lambda: [
            (type(x), tuple(x.shape), x.stride(), x.dtype, x.requires_grad)
            for x in [private.make_wrapper(Shell, (2, 3), (1, 2), torch.float32)]
        ],
        [(Shell, (2, 3), (1, 2), torch.float32, True)],
    ),
    "list_outputs": (
        lambda: next(private.list_outputs(x.grad_fn) for x, _ in [Twice.apply(X)]),
        [((2, 3), torch.float32), ((3,), torch.float32)],
    ),
    "count_writes": (write, [0, 1]),
    "OWN": (lambda: vars(nn.LSTM(1, 1)).keys() & {"_flat_weights"} <= private.OWN, True),
    "BACKWARD_HOOKS": (
        lambda: [
            any(getattr(hook(add), x, None) for x in private.BACKWARD_HOOKS)
            for add in (
                lambda m: None,
                lambda m: m.register_full_backward_hook(print),
                lambda m: m.register_full_backward_pre_hook(print),
            )
        ],
        [False, True, True],
    ),
    "list_hooks": (
        lambda: private.list_hooks(
            hook(lambda m: (m.register_forward_hook(print), m.register_forward_pre_hook(repr)))
        ),
        (print, repr),
    ),
    "read_children": (
        lambda: private.read_children(PLAIN),
        {"0": PLAIN[0], "1": PLAIN[1]},
    ),
    "copy_hooks": (
        lambda: [
            list(x.values())
            for x in private.copy_hooks(hook(lambda m: m.register_forward_hook(print))).values()
            if x
        ],
        [[print]],
    ),
    "read_tensors": (
        lambda: private.read_tensors(PLAIN[1]).keys(),
        {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"},
    ),
    "initialize": (initialized, True),
}


@pytest.mark.parametrize("name", CONTRACTS)
def test_contract(name: str) -> None:
    """What a private name does."""
    compute, expected = CONTRACTS[name]
    assert compute() == expected, f"torch {version('torch')}, torchax {version('torchax')}"


def test_each_name_has_a_contract() -> None:
    kinds = nn, torch, private.torch
    names = {
        name
        for name, x in vars(private).items()
        if not name.startswith("_") and x not in kinds and not inspect.ismodule(x)
    } | {"pytree"}
    modules = {"Any", "Callable", "Iterator", "Mapping", "Sequence", "decomposition_table"}
    assert names - modules - {"no_dispatch"} == CONTRACTS.keys()
