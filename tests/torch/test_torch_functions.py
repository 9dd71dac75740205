"""`jlora.torch` computes what PyTorch does, gradients included, or refuses by name."""

import os
import pathlib
import random
import sys
import types
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
import processes
import pytest

pytest.importorskip("jlora.torch._apply")

import torch
from small import KEY, set_up_noisy
from torch import nn
from torch_functions import (
    CONSTANTS,
    DRAWS,
    FUNCTIONS,
    GRADIENTS,
    Case,
    Kept,
    Lambda,
    bags,
    hold,
    make_table,
    within,
)

import jlora
from jlora import LoRA
from jlora.torch import compare, extract

# What torchax warns of is its own.
X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


def weights(x: Any) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)


def assert_close(found: Any, expected: Any, why: str) -> None:
    """Up to the size of the largest entry; what is not finite is the same."""
    expected = np.asarray(expected)
    size = max(1e-3, np.abs(expected[np.isfinite(expected)]).max(initial=0))
    np.testing.assert_allclose(found, expected, 1e-4, 1e-4 * size, err_msg=why)


def differentiate(model: nn.Module) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The values and the gradients of PyTorch; zeros where it has none."""
    y = model(torch.tensor(X))
    if y.requires_grad:
        (y * torch.tensor(weights(y))).sum().backward()
    zeros = {name: np.zeros(x.shape) for name, x in model.named_parameters()}
    grads = {n: x.grad.numpy() for n, x in model.named_parameters() if x.grad is not None}
    return y.detach().numpy(), zeros | grads


# Functions without a weight that a low-rank change fits: of which the result does not depend on
# the weight, or that solve for it.
UNADAPTED = {"all", "broadcast", "copy_ of one row", "zeros_like", "solve", "solve for a vector"}
UNADAPTED |= {"norm 0 at 0", "norm 0 at 2", "of a weight"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str) -> None:
    """Values and gradients are PyTorch's, eager and compiled; and the adapted ones the merged."""
    model = hold(FUNCTIONS[name])
    params, apply = extract(model)
    y, grads = differentiate(model)
    assert_close(apply(params, X), y, "eager")
    out, grad = compute(lambda p: apply(p, X), params)
    assert_close(out, y, "compiled")
    for key, expected in grads.items():
        assert_close(grad["l"][key.removeprefix("l.")], expected, f"gradient of {key}")
    if name not in UNADAPTED:
        lora, base, adapter = set_up_noisy(apply, LoRA("l/weight", rank=2), params, X)
        found = compute(lambda a: lora.apply(base, a, X), adapter)
        merged = compute(lambda a: apply(jlora.merge(base, a), X), adapter)
        for x, expected in zip(*map(jax.tree.leaves, (found, merged)), strict=True):
            assert_close(x, expected, "adapted")


def compute(f: Callable[[Any], jax.Array], tree: Any) -> tuple[jax.Array, Any]:
    """The values of a function, and the gradient of a sum of them; compiled."""

    def loss(tree: Any) -> tuple[jax.Array, jax.Array]:
        out = f(tree)
        return (out * weights(out)).sum(), out

    step = jax.grad(loss, has_aux=True)
    options = {"xla_backend_optimization_level": 0}  # compiles faster
    grad, out = jax.jit(step, compiler_options=options)(tree)
    return out, grad


def nest(f: Case) -> nn.Module:
    """A module in modules."""
    return Lambda(lambda m, x: m.layers[0](x), layers=nn.ModuleList([hold(f)])).eval()


def refuses(f: Case, why: str) -> None:
    """Names the module and the line, eager and traced."""
    params, apply = extract(nest(f))
    for call in (apply, jax.jit(apply)):
        with pytest.raises(NotImplementedError, match=rf"^layers\.0 \(Lambda, \S+:\d+\) {why}"):
            call(params, X)


@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_refused(name: str) -> None:
    refuses(DRAWS[name], "draws random numbers, which would be the same in each call")


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_draws_that_change_outputs_are_refused(draw: Callable[[], float]) -> None:
    """By generators that all share; with a seed, or unused, they change nothing."""
    _, apply = extract(hold(lambda h, m: h * float(draw())))
    params, unused = extract(hold(lambda h, m: (draw(), h)[1]))
    for make in (lambda x: x, jax.jit):
        with pytest.raises(NotImplementedError, match=r"draws numbers .* same in each call"):
            make(apply)(params, X)
        assert make(unused)(params, X).shape == X.shape


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_pytorch_are_refused(name: str) -> None:
    refuses(GRADIENTS[name], "asks PyTorch for gradients. Differentiate `apply` by jax.grad")


def written_as_complex(h: torch.Tensor, module: nn.Module) -> torch.Tensor:
    x = h * 1
    torch.view_as_complex(x.view(3, 2, 2)).mul_(2)
    return x


REFUSED: dict[str, tuple[Case, str]] = {
    "autocast": (
        lambda h, m: within(torch.autocast("cpu", dtype=torch.bfloat16), lambda: h * 2),
        r"runs under torch.autocast, which JAX has not. Convert the model by model.to\(torch",
    ),
    "a constant that is written": (
        lambda h, m: torch.zeros(3, 4).copy_(h),
        r"writes arrays of JAX into a tensor of PyTorch's own, by aten.copy_.*torch.zeros_like",
    ),
    "an operator that torchax lacks": (
        lambda h, m: torch.geqrf(h)[0],
        r"calls aten\.geqrf\.default, which torchax does not have\. Write it by other",
    ),
    "an operator that fails": (
        lambda h, m: torch.nn.functional.linear(h, m.l.weight[:, :3]),
        r"calls aten\.linear.* float32.3,4., float32.4,3., where torchax fails: .*by other",
    ),
    "a decomposition that differs": (
        lambda h, m: torch.nn.functional.multilabel_margin_loss(h, h.argsort()),
        r"calls aten.multilabel_margin_loss_forward.default, which torchax does not have\. Write",
    ),
    "bags by how often": (
        lambda h, m: bags(h, "sum", scale_grad_by_freq=True),
        "calls embedding_bag with scale_grad_by_freq. Leave it out",
    ),
    "a condition": (
        lambda h, m: torch.cond(h.sum() > 0, torch.exp, torch.sin, (h,)),
        "calls cond, whose functions JAX cannot trace. Write it by torch.where",
    ),
    "a view of another dtype": (
        written_as_complex,
        "writes into a view of another dtype. Write into the tensor itself",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    refuses(*REFUSED[name])


def test_modes_of_the_caller() -> None:
    """They change nothing: JAX's own function has no such mode."""
    params, apply = extract(hold(FUNCTIONS["no_grad"]))
    expected = jax.grad(lambda p: apply(p, X).sum())(params)
    for mode in (torch.no_grad(), torch.inference_mode()):
        found = within(mode, lambda: jax.grad(lambda p: apply(p, X).sum())(params))
        np.testing.assert_array_equal(found["l"]["weight"], expected["l"]["weight"])


def test_what_functions_keep() -> None:
    """What `backward` reads has been given to `save_for_backward`."""
    params, apply = extract(nest(lambda h, m: Kept.apply(h)))
    assert apply(params, X).shape == X.shape
    why = r"^layers\.0 \(Lambda, \S+:\d+\) calls Kept, an .* keeps a Tensor in ctx\.scale"
    with pytest.raises(NotImplementedError, match=why):
        jax.grad(lambda p: apply(p, X).sum())(params)


def with_state(f: Callable[[Any, torch.Tensor], torch.Tensor]) -> nn.Module:
    """Has state of many kinds, which the function may change."""
    objects = {"space": types.SimpleNamespace(sum=0), "array": np.zeros(2), "set": set()}
    objects |= {"generator": torch.Generator()}
    state = {"buffer": nn.Buffer(torch.ones(4)), "count": 0, "state": None, "seen": []}
    run = lambda m, x: f(m, m.l(x))  # noqa: E731
    return Lambda(run, l=nn.Linear(4, 4), objects=objects, **state).eval()


def setting(**values: Callable[[Any, torch.Tensor], Any]) -> Callable[..., torch.Tensor]:
    """Sets attributes, and computes with them."""

    def f(m: Any, h: torch.Tensor) -> torch.Tensor:
        for name, value in values.items():
            setattr(m, name, value(m, h))
        return sum((getattr(m, name) for name in values), h)

    return f


# What changes the next call, with the attribute that the error names.
CHANGES: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "a counter": (setting(count=lambda m, h: m.count + 1), "count"),
    "a buffer": (setting(buffer=lambda m, h: m.buffer + 1), "buffer"),
    "a buffer in place": (setting(buffer=lambda m, h: m.buffer.mul_(2)), "buffer"),
    "a part of a buffer": (lambda m, h: (put_in(m.buffer), h)[1], "buffer"),
    "data of a weight": (lambda m, h: (m.l.weight.data.clamp_(-1, 1), h)[1], r"l\.weight"),
    "statistics": (setting(buffer=lambda m, h: m.buffer * 0.9 + h.detach().mean(0)), "buffer"),
    "a list of numbers": (lambda m, h: (m.seen.append(1), h * len(m.seen))[1], "seen"),
    "a state": (setting(state=lambda m, h: h if m.state is None else h + m.state), "state"),
    "a list of states": (lambda m, h: (m.seen.append(h), sum(m.seen))[1], "seen"),
    "an object with a state": (lambda m, h: remember(m, h), "memory"),
    "an object": (lambda m, h: (vars(m.objects["space"]).update(sum=1), h)[1], "objects"),
    "an array": (lambda m, h: (m.objects["array"].__iadd__(1), h)[1], "objects"),
    "a set": (lambda m, h: (m.objects["set"].add(len(m.objects["set"])), h)[1], "objects"),
    "the last state, returned": (lambda m, h: (m.state, setattr(m, "state", h))[0], "state"),
}


def put_in(x: torch.Tensor) -> None:
    x[0] = 3


def remember(m: Any, h: torch.Tensor) -> torch.Tensor:
    if not hasattr(m, "memory"):
        m.memory = types.SimpleNamespace(sum=0)
    m.memory.sum = m.memory.sum + h
    return m.memory.sum * 1


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_refused(name: str) -> None:
    f, attribute = CHANGES[name]
    params, apply = extract(with_state(f))
    for call in (apply, jax.jit(apply)):
        with pytest.raises(NotImplementedError, match=rf"`model` .* its {attribute}\b.* argument"):
            call(params, X)


def keep_size(m: Any, x: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Adds what the first call has kept."""
    if m.kept is None:
        m.kept = size * 2
    return x + m.kept


def test_states_of_static_arguments_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"`model` leaves values in its kept which"):
        extract(Lambda(keep_size, kept=None).eval())[1]({}, X, torch.ones(4))


def cached(m: Any, h: torch.Tensor) -> torch.Tensor:
    if m.state is None or len(m.state) < len(h):
        m.state = torch.arange(len(h), device=h.device)[:, None] * m.buffer * m.l.bias
    return h + m.state[: len(h)]


KEPT: dict[str, Callable[..., torch.Tensor]] = {
    "the last hidden states": lambda m, h: (setattr(m, "state", h), h * 2)[1],
    "all hidden states": lambda m, h: (m.seen.append(h), h * 2)[1],
    "hidden states by name": lambda m, h: (setattr(m, "seen", {"h": h}), h)[1],
    "a cache": cached,
    "a flag": lambda m, h: (setattr(m, "is_ready", True), h)[1],
    "a generator": lambda m, h: h * len(m.objects),
    "a state that is made again": setting(state=lambda m, h: h * 3),
}


@pytest.mark.parametrize("name", KEPT)
def test_attributes_that_change_nothing(name: str) -> None:
    """What no later call reads, and what each call makes of its parameters alone."""
    model = with_state(KEPT[name])
    params, apply = extract(model)
    y = model(torch.tensor(X))
    y.sum().backward()
    for _ in range(2):
        assert_close(apply(params, X), y.detach(), name)
        assert_close(jax.jit(apply)(params, X), y.detach(), name)
    grad = jax.grad(lambda p: apply(p, X).sum())(params)
    assert_close(grad["l"]["weight"], model.l.weight.grad, name)
    sites = jlora.transform(apply).sites(params, X)
    assert [x.path for x in sites] == ["l/weight"]


PARAMETRIZED: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "a forward hook": lambda: hooked(nn.Linear(4, 4)),
    "an LSTM": lambda: with_one_output(nn.LSTM(4, 4, 2, bidirectional=True)),
    "a GRU": lambda: with_one_output(nn.GRU(4, 4)),
}


def with_one_output(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, out: out[0])
    return module


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    module.register_forward_hook(lambda module, args, out: out.relu())
    return module


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrizations(name: str) -> None:
    torch.manual_seed(0)
    model = PARAMETRIZED[name]().eval()
    found = compare(model, *extract(model), X)
    assert not found, found


def test_hooks_on_gradients_are_refused() -> None:
    """Of modules and of parameters; by the functions of PyTorch, of a whole backward pass."""
    made = nest(lambda h, m: (m.register_full_backward_hook(lambda *args: None), h)[1])
    with pytest.raises(ValueError, match="hooks that JAX would not call"):
        extract(made)[1](extract(made)[0], X)
    for place, register in {
        "layers.0.l": lambda m: m.layers[0].l.register_full_backward_hook(lambda *args: None),
        "layers.0": lambda m: m.layers[0].register_full_backward_pre_hook(lambda *args: None),
        "layers.0.l.bias": lambda m: m.layers[0].l.bias.register_hook(lambda g: g * 2),
    }.items():
        model = nest(FUNCTIONS["abs at 0"])
        handle = register(model)
        with pytest.raises(ValueError, match="hooks that JAX would not call") as caught:
            extract(model)
        assert [x.where for x in caught.value.problems] == [place]
        handle.remove()
        extract(model)


READS: dict[str, tuple[str, Case]] = {
    "NumPy": ("NumPy", lambda h, m: torch.from_numpy(np.tanh(h.detach().numpy()))),
    "a condition": ("aten", lambda h, m: h * 2 if h.sum() > 0 else h * 3),
    "a number": ("aten", lambda h, m: h * int(h.abs().max())),
    "a list": ("NumPy", lambda h, m: h * h[0].detach().tolist()[0]),
    "a mask": ("aten", lambda h, m: h[h > 0]),
    "nonzero": ("aten", lambda h, m: h[:, 0] * len(torch.nonzero(h))),
}


@pytest.mark.parametrize("name", READS)
def test_values_in_forward(name: str) -> None:
    """Values that are traced cannot be read; the error says where, and what to write."""
    by, f = READS[name]
    model = nest(f)
    params, apply = extract(model)
    assert_close(apply(params, X), differentiate(model)[0], "eager")
    why = rf"layers\.0 \(Lambda, \S+\) reads values by {by}.*Use PyTorch's functions there"
    with pytest.raises(jax.errors.TracerArrayConversionError, match=why):
        jax.jit(apply)(params, X)
    with pytest.raises(TypeError, match=r"reads the value of .* Use PyTorch's functions there"):
        jlora.transform(apply, LoRA(rank=2)).init(KEY, params, X)


@pytest.mark.parametrize("remat", [{}, {"layers/0": None}])
def test_what_models_cache(remat: Any) -> None:
    """It outlives the trace in which it was computed."""
    model = nest(CONSTANTS["a cached table"])
    y, grads = differentiate(model)
    make_table.cache_clear()
    for _ in range(2):
        params, apply = extract(model, remat=remat)
        jlora.transform(apply).sites(params, X)
        out, grad = compute(lambda p, apply=apply: apply(p, X), params)
        assert_close(out, y, "cached")
        assert_close(grad["layers"]["0"]["l"]["bias"], grads["layers.0.l.bias"], "gradient")
    assert make_table.cache_info().misses == 1


def test_compile_goes_on_to_work() -> None:
    """Nothing of PyTorch changes by the import of `jlora.torch`, in a process of its own."""
    code = """
import torch
known = {x: getattr(torch, x) for x in vars(torch)}, dict(vars(torch.accelerator))
import jlora.torch
jlora.torch.extract(torch.nn.Linear(4, 4).eval())
assert torch._C._get_privateuse1_backend_name() == "privateuseone"
assert all(getattr(torch, k) is x for k, x in known[0].items())
assert all(getattr(torch.accelerator, k) is x for k, x in known[1].items())
assert torch.compile(torch.nn.Linear(4, 4), backend="eager")(torch.ones(2, 4)).shape == (2, 4)
"""
    processes.run("-c", code, check=True, capture_output=False)


def test_floats_of_64_bits() -> None:
    with pytest.warns(UserWarning, match="`model` has tensors of 64 bits, such as 0.weight, which"):
        extract(nn.Sequential(nn.Linear(4, 4).double()).eval())


def test_a_version_that_torchax_does_not_know(tmp_path: pathlib.Path) -> None:
    """The error has both versions; the one of PyTorch is 2.13, say."""
    (tmp_path / "torchax" / "ops").mkdir(parents=True)
    text = "import torch\ntorch.ops.aten.all.dimname_of_old\n"
    (tmp_path / "torchax" / "__init__.py").touch()
    (tmp_path / "torchax" / "ops" / "__init__.py").write_text(text)
    code = "import jlora.torch, torch; jlora.torch.extract(torch.nn.Linear(1, 1))"
    paths = [str(tmp_path), *sys.path]
    run = processes.run("-c", code, env={"PYTHONPATH": os.pathsep.join(paths)})
    assert f"does not import with torch {version('torch')}" in run.stderr
    assert "ImportError: jlora.torch.extract needs torchax, and torchax 0." in run.stderr
