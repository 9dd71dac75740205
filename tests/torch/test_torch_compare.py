"""`jlora.torch.compare` sees what differs from PyTorch, and nothing else."""

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jlora.torch._apply")

import jax
import jax.numpy as jnp
import torch
from small import set_up
from torch import nn
from torch_functions import Lambda

import jlora
from jlora import LoRA
from jlora.torch import compare, extract
from jlora.torch._differences import GRADIENT, OUTPUT, judge

X = jax.random.normal(jax.random.key(0), (3, 4))
Function = Callable[[Any, torch.Tensor], Any]


class Net(Lambda):
    """Layers, and a function of what they compute."""

    calls = 0

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> Any:
        """Calls one after the other."""
        for layer in self.layers:
            x = layer(x)
        return self.function(self, x * scale)

    def halve(self, x: torch.Tensor) -> torch.Tensor:
        """Is another method."""
        return self.forward(x) / 2


def made(function: Function = lambda m, h: h, scale: float = 1.0) -> Net:
    """Of layers with an unused table; the second is scaled."""
    torch.manual_seed(0)
    block = lambda m, x: m.linear(x).tanh() * m.scale  # noqa: E731
    layers = [Lambda(block, linear=nn.Linear(4, 4), scale=x) for x in (1.0, scale, 1.0)]
    parts = {"layers": nn.ModuleList(layers), "table": nn.Embedding(5, 4), "seen": []}
    return Net(function, **parts).eval()


def count(m: Net, h: torch.Tensor) -> torch.Tensor:
    m.seen.append(1)
    return h * len(m.seen)


def count_calls(m: Net, h: torch.Tensor) -> torch.Tensor:
    type(m).calls += 1
    return h * type(m).calls


def hooked(m: Net, h: torch.Tensor) -> torch.Tensor:
    h.register_hook(lambda g: 2 * g)
    return h * 1


def hook_more(m: Net, h: torch.Tensor) -> torch.Tensor:
    m.doubled = [*getattr(m, "doubled", []), 2]
    h.register_hook(lambda g: 2 ** len(m.doubled) * g)
    return h * 1


DRAWN = random.Random(0)
# A module, one of which `apply` is made instead, what is seen of it, and the likely cause.
SEEN: dict[str, tuple[Net, Net, str, str]] = {
    "a value": (made(scale=1.1), made(), "output", "layers.1 (Lambda)"),
    "a shape": (made(lambda m, h: h[:2]), made(), "output", "the root (Net)"),
    "a NaN": (made(lambda m, h: h * torch.nan), made(), "output", "the root (Net)"),
    "an output": (made(lambda m, h: {"a": h, "b": h}), made(lambda m, h: {"a": h}), "output", ""),
    "an integer": (made(lambda m, h: h.long()), made(lambda m, h: h.long() + 1), "output", "root"),
    "grad mode": (made(lambda m, h: h * (1 + h.requires_grad)), made(), "output", "root"),
    "a state": (made(count), made(), "output of call 2", "keeps a state"),
    "a class attribute": (made(count_calls), made(), "output of call 2", "keeps a state"),
    "a draw": (made(lambda m, h: h + DRAWN.random()), made(), "output", ""),
    "a gradient": (made(lambda m, h: h * 2 - h.detach()), made(), "gradient", "hook on gradients"),
    "more hooks": (made(hook_more), made(), "gradient layers.0", "hook on gradients"),
    "a hook": (made(hooked), made(), "gradient layers.0", "hook on gradients"),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_differs_is_seen(name: str) -> None:
    """With its place and its likely cause."""
    model, other, what, hint = SEEN[name]
    params, apply = extract(other)
    found = compare(model, params, apply, X)
    assert found
    assert what in str(found) and hint in str(found), found
    assert "Likely cause: " in str(found)
    if what == "gradient":
        assert not compare(model, params, apply, X, gradients=False)


def half(model: Net) -> Net:
    return model.to(torch.bfloat16)


ALIKE: dict[str, tuple[Net, dict[str, Any]]] = {
    "plain": (made(), {}),
    "a scan": (made(), {"scan": ["layers"]}),
    "computed again": (made(), {"remat": {r"layers/\d": None}}),
    "16 bits": (half(made(lambda m, h: h.softmax(-1))), {}),
    "frozen": (made().requires_grad_(False), {}),
    "no gradient": (made(lambda m, h: h.detach()), {}),
    "integers": (made(lambda m, h: (h.argmax(-1), h > 0, h)), {}),
    "infinite": (made(lambda m, h: (h - torch.inf, h.masked_fill(h > 0, -torch.inf))), {}),
    "rounding alone": (made(lambda m, h: (h * 1e4).exp().log1p() - (h * 1e4).relu()), {}),
    "written": (made(lambda m, h: h.clone().mul_(2)), {}),
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_is_equal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the caller's mode; the module stays as it was. What it costs is said."""
    model, options = ALIKE[name]
    before = {k: (x.clone(), x.requires_grad, x.grad) for k, x in model.named_parameters()}
    params, apply = extract(model, **options)
    x = X.astype(jnp.bfloat16) if name == "16 bits" else X
    with torch.no_grad():
        found = compare(model, params, apply, x)
    assert not found, found
    assert str(found) == "`apply` computes what PyTorch does."
    assert "a backward pass with" in capsys.readouterr().err
    for k, p in model.named_parameters():
        assert torch.equal(p, before[k][0]) and (p.requires_grad, p.grad) == before[k][1:]


def test_arguments() -> None:
    """Keywords of a partial, another method, static ones."""
    model = made()
    params, apply = extract(model)
    assert not compare(model, params, functools.partial(apply, scale=2.0), X)
    assert not compare(model, params, apply, x=X)
    w = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j, 1j, 2.0]))
    turned = Lambda(lambda m, x: (m.w * x) ** 2, w=w).eval()  # JAX conjugates its gradients
    assert not compare(turned, *extract(turned), X)
    assert not compare(model, params, apply, X, method="halve")
    few = lambda m, h: h if len(h) == 2 else h * torch.nan  # noqa: E731
    assert not compare(made(few), *extract(made()), X, rows=2, gradients=False)
    assert not compare(model, params, apply, np.asarray(X), scale=3.0)
    assert not compare(model, params, apply, torch.tensor(np.asarray(X)))


@pytest.mark.parametrize("what", [GRADIENT, OUTPUT])
def test_rounding_at_a_kink(what: str) -> None:
    """It is in one gradient in PyTorch and in another in JAX; of outputs, each has its own."""
    ours = {"a": 1 + np.array([2e-3, 0]), "b": np.ones(2)}
    theirs = {"a": np.ones(2), "b": 1 + np.array([1e-3, 0])}
    wide = {name: np.ones(2) for name in ours}
    found = judge({what: ours}, {what: theirs}, lambda: {what: wide})
    assert [x.where for x in found] == ([] if what == GRADIENT else ["a"])
    found = judge({what: ours | {"a": 0.98 * wide["a"]}}, {what: theirs}, lambda: {what: wide})
    assert [x.where for x in found] == ["a"]


def listed() -> nn.Module:
    """Calls a module that a plain list holds, and PEFT replaces elsewhere."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    return Lambda(lambda m, x: m.layers[0](x), layers=[layer], **{"0": layer}).eval()


@pytest.mark.parametrize(("model", "is_reached"), [(made(), True), (listed(), False)])
def test_adapters_are_compared_with_peft(model: Any, is_reached: bool) -> None:
    """Also those that were just made, whose B is 0."""
    pytest.importorskip("peft")
    params, apply = extract(model)
    lora, base, adapter = set_up(apply, LoRA("linear/weight|0/weight", rank=2), params, X)
    sites = lora.sites(params, X)
    names = jlora.torch.names(sites, apply)
    assert bool(jlora.peft.check_sites(sites, names)) != is_reached
    if not is_reached:  # what is refused by these names is also seen
        names = jlora.torch.names(sites)
    found = compare(model, base, apply, X, adapter=adapter, names=names)
    assert bool(found) != is_reached
    assert is_reached or "PEFT does not reach" in found.cause


def test_refused() -> None:
    model = made()
    params, apply = extract(model)
    with pytest.raises(TypeError, match=r"`apply` must be the function that .* got function\."):
        compare(model, params, lambda *_: X, X)
    with torch.device("meta"):
        empty = made()
    with pytest.raises(ValueError, match=r"(?s)on PyTorch's meta device.* smaller model"):
        compare(empty, params, apply, X)
    with pytest.raises(ValueError, match="evaluation mode"):
        compare(made().train(), params, apply, X)


def test_a_difference_is_data() -> None:
    params, apply = extract(made())
    [found] = compare(made(scale=2.0), params, apply, X).found
    assert (found.what, found.where) == ("output", "")
    assert 1e-4 <= found.bound < 1e-3 < found.error <= 1
