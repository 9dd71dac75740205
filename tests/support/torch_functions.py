"""What modules of PyTorch do in `forward`: tables of functions of hidden states and their module.

Hidden states have the shape (3, 4). Needs PyTorch.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

F = nn.functional
Case = Callable[[torch.Tensor, Any], torch.Tensor]


class Lambda(nn.Module):
    """A function of a module and the arguments of a call, with the parts that it needs."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        """Holds parts, such as modules, parameters and numbers, by name."""
        super().__init__()
        self.function = function
        for name, x in parts.items():
            setattr(self, name, x)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Computes the function of itself."""
        return self.function(self, *args, **kwargs)


def hold(f: Case) -> nn.Module:
    """Applies a function to the outputs of a linear module."""
    torch.manual_seed(0)
    return Lambda(lambda m, x: f(m.l(x), m), l=nn.Linear(4, 4)).eval()


def derive(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    """A function of PyTorch with a `backward` of its own."""
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)


def keep(ctx: Any, scale: Any, result: torch.Tensor) -> torch.Tensor:
    """Keeps a number for `backward`, or a tensor that `save_for_backward` does not get."""
    ctx.scale = scale
    return result


def save(ctx: Any, result: torch.Tensor) -> torch.Tensor:
    """Saves a result for `backward`."""
    ctx.save_for_backward(result)
    return result


Rounded = derive("Rounded", lambda ctx, x: x.round(), lambda ctx, g: g)
Reversed = derive(
    "Reversed", lambda ctx, x, scale: keep(ctx, scale, x), lambda ctx, g: (-ctx.scale * g, None)
)
Kept = derive("Kept", lambda ctx, x: keep(ctx, x.detach(), x * 1), lambda ctx, g: -ctx.scale * g)
Saved = derive("Saved", lambda ctx, x: save(ctx, x.exp()), lambda ctx, g: -ctx.saved_tensors[0] * g)
Written = derive(
    "Written",
    lambda ctx, x, mask: save(ctx, x.exp().masked_fill_(mask, 0)),
    lambda ctx, g: (ctx.saved_tensors[0] * g, None),
)
Pair = derive("Pair", lambda ctx, x: (x * 2, x + 1), lambda ctx, g, h: 5 * g - h)


def within(context: Any, f: Callable[[], Any]) -> Any:
    with context:
        return f()


def switched(h: torch.Tensor) -> torch.Tensor:
    torch.set_grad_enabled(False)
    found = h.exp()
    torch.set_grad_enabled(True)
    return found


def written(write: Callable[[torch.Tensor], Any], start: Any = None) -> Case:
    """Changes a copy of the hidden states in place, and returns it."""

    def f(h: torch.Tensor, module: Any) -> torch.Tensor:
        x = h * 1 if start is None else start(h)
        write(x)
        return x

    return f


def assign(x: Any, name: str, value: Any) -> None:
    setattr(x, name, value)


def put(index: Any, value: Any) -> Callable[[torch.Tensor], None]:
    """Assigns to a part; a function of the tensor makes the value."""
    return lambda x: x.__setitem__(
        index(x) if callable(index) else index, value(x) if callable(value) else value
    )


no_grad, inference = torch.no_grad, torch.inference_mode

STOPS: dict[str, Case] = {
    "no_grad": lambda h, m: h + within(no_grad(), h.exp),
    "no_grad around a module": lambda h, m: h + within(no_grad(), lambda: m.l(h)),
    "no_grad around a slice": lambda h, m: h[:, :2] * within(no_grad(), lambda: h[:, :2]),
    "no_grad around flatten": lambda h, m: h.flatten() * within(no_grad(), h.flatten),
    "no_grad around nothing": lambda h, m: h * within(no_grad(), lambda: h),
    "no_grad as a decorator": lambda h, m: h + no_grad()(m.l)(h),
    "enable_grad inside": lambda h, m: within(
        no_grad(), lambda: within(torch.enable_grad(), h.exp)
    ),
    "inference_mode": lambda h, m: h + within(inference(), h.exp).clone(),
    "set_grad_enabled": lambda h, m: h + switched(h),
    "detach": lambda h, m: h * h.detach(),
    "detach, the function": lambda h, m: h * torch.detach(h),
    "detach of a slice": lambda h, m: h[:, :2] * h[:, :2].detach(),
    "detach of a view": lambda h, m: h.t() * h.view(3, 4).t().detach(),
    "detach of a part": lambda h, m: written(put((slice(None), 0), lambda x: x[:, 0].detach()))(
        h, m
    ),
    "detach_": lambda h, m: h * (h * 2).detach_(),
    "detach_, the function": lambda h, m: h * torch.detach_(h * 2),
    "data": lambda h, m: h * h.data,
    "data of a slice": lambda h, m: h[:, :2] * h[:, :2].data,
    "a trained bias on detached": lambda h, m: h + h.detach().clone().add_(m.l.bias),
    "write into detached": written(lambda x: x.detach().mul_(3)),
    "write into data": written(lambda x: x.data.mul_(3)),
    "write a part of data": written(lambda x: put((slice(None), 0), 5.0)(x.data)),
    "assign data": written(lambda x: assign(x, "data", x.data * 3)),
    "write under no_grad": written(lambda x: within(no_grad(), lambda: x.mul_(3))),
    "write a part under no_grad": written(
        lambda x: within(no_grad(), lambda: put((slice(None), 0), 5.0)(x))
    ),
    "mask under no_grad": lambda h, m: written(
        lambda x: within(no_grad(), lambda: x.masked_fill_(x > 1, -torch.inf))
    )(h, m).softmax(-1),
    "vjp by torch.func": lambda h, m: torch.func.grad(lambda x: (x.exp() * x).sum())(h),
    "checkpoint": lambda h, m: torch.utils.checkpoint.checkpoint(m.l, h, use_reentrant=False),
}

WRITES: dict[str, Case] = {
    name: written(f)
    for name, f in {
        "a column": put((slice(None), 0), 0.0),
        "a row": put(0, 1.0),
        "a row of tensors": put(1, lambda x: x[0] * 2),
        "all": put(..., 2.0),
        "a mask": put(lambda x: x > 0, 0.0),
        "rows by a list": put([0, 2], lambda x: x[[0, 2]] * 2),
        "rows swapped": put([0, 1], lambda x: x[[1, 0]]),
        "places": put((torch.tensor([0, 1]), torch.tensor([1, 2])), 7.0),
        "a row by a value": put(lambda x: x[:, 0].argmax(), 5.0),
        "broadcast": put(slice(None), torch.arange(4.0)),
        "a slice times": lambda x: x[:, 0].mul_(2),
        "a slice to zero": lambda x: x[:, 0].zero_(),
        "a slice filled": lambda x: x[0].fill_(3.0),
        "a slice copied": lambda x: x[:, :2].copy_(x[:, 2:]),
        "a slice masked": lambda x: x[:, :2].masked_fill_(x[:, :2] > 0, 0.0),
        "a slice of a slice": lambda x: x[:2][:, 1:].add_(1.0),
        "a part of a slice": lambda x: put((slice(None), 1), 9.0)(x[:2]),
        "every other row": lambda x: x[::2].mul_(2),
        "view": lambda x: x.view(-1).mul_(2),
        "a part of a view": lambda x: put(0, 5.0)(x.view(-1)),
        "reshape": lambda x: x.reshape(2, 6).mul_(2),
        "flatten": lambda x: x.flatten().mul_(2),
        "t": lambda x: x.t().mul_(torch.arange(4.0)[:, None]),
        "transpose": lambda x: x.transpose(0, 1)[1].mul_(2),
        "unsqueeze": lambda x: x.unsqueeze(0).add_(1),
        "select": lambda x: x.select(1, 0).zero_(),
        "narrow": lambda x: x.narrow(1, 0, 2).zero_(),
        "diagonal": lambda x: x.diagonal().fill_(9.0),
        "fill_diagonal_": lambda x: x.fill_diagonal_(9.0),
        "unfold": lambda x: x.unfold(1, 2, 2).mul_(2),
        "unflatten": lambda x: x.unflatten(1, (2, 2))[..., 0].mul_(2),
        "tensor_split": lambda x: torch.tensor_split(x, 2)[0].mul_(2),
        "contiguous": lambda x: x.contiguous().mul_(2),
        "to the same dtype": lambda x: x.to(torch.float32).mul_(2),
        "another dtype": lambda x: x.to(torch.bfloat16).mul_(2),
        "type_as": lambda x: x.type_as(torch.zeros(1, dtype=torch.float16)),
        "add_": lambda x: x.add_(x, alpha=2),
        "+=": lambda x: x.__iadd__(1),
        "**=": lambda x: x.__ipow__(2),
        "exp_": lambda x: x.exp_(),
        "clamp_": lambda x: x.clamp_(-0.5, 0.5),
        "masked_fill_": lambda x: x.masked_fill_(x > 0, 0.0),
        "a tensor filled in": lambda x: x.masked_fill_(x > 0, torch.tensor(-1.0)),
        "index_add_": lambda x: x.index_add_(0, torch.tensor([0, 0]), torch.ones(2, 4)),
        "scatter_": lambda x: x.scatter_(1, torch.tensor([[0], [1], [2]]), 5.0),
        "copy_ of one row": lambda x: x.copy_(torch.ones(4)),
        "relu, in place": lambda x: F.relu(x, inplace=True),
        "unsqueeze_": lambda x: x.unsqueeze_(1),
        "transpose_": lambda x: x.transpose_(0, 1).mul_(torch.arange(3.0)),
        "squeeze_ of a view": lambda x: x.view(3, 1, 4).squeeze_(1).mul_(torch.arange(4.0)),
        "t_ of a view": lambda x: x.view(4, 3).t_().mul_(torch.arange(4.0)),
    }.items()
} | {
    "the base of a view": lambda h, m: (x := h * 1, x.t(), x.mul_(2))[1],
    "a view of what another changes": lambda h, m: (x := h * 1, x.view(-1), x[0].mul_(2))[1],
    "a copy of a transposed one": written(lambda x: x.t().contiguous().mul_(2)),
    "a reshaped transposed one": written(lambda x: x.t().reshape(-1).mul_(2)),
    "a clone": written(lambda x: x.clone().mul_(2)),
    "zeros_like": written(lambda x: put((slice(None), 0), 1.0)(x), torch.zeros_like),
    "integers": lambda h, m: h * written(lambda x: x.t()[0].fill_(2), torch.Tensor.long)(h, m),
    "a mask in place": lambda h, m: h.masked_fill(
        written(lambda x: x.view(-1)[:3].fill_(True), lambda h: h > 9)(h, m), 0.0
    ),
    "a mask of PyTorch's own": lambda h, m: (
        h + torch.zeros(4, 4).masked_fill_(torch.eye(4, dtype=torch.bool), -9)[:3]
    ),
}


def at(value: float, f: Callable[[torch.Tensor], torch.Tensor]) -> Case:
    """A function at a value, with a gradient."""
    return lambda h, m: f(h - h.detach() + value)


KINKS: dict[str, Case] = {
    f"{name} at {value}": at(value, f)
    for name, f, values in [
        ("abs", torch.abs, (0, 1)),
        ("relu", torch.relu, (0,)),
        ("relu6", F.relu6, (0, 6)),
        ("hardtanh", F.hardtanh, (-1, 1)),
        ("hardswish", F.hardswish, (-3, 0, 3)),
        ("hardsigmoid", F.hardsigmoid, (-3, 3)),
        ("leaky_relu", F.leaky_relu, (0,)),
        ("elu", F.elu, (0,)),
        ("logsigmoid", F.logsigmoid, (0,)),
        ("sinc", torch.sinc, (0, 0.5)),
        ("clamp", lambda x: x.clamp(0, 1), (0, 0.5, 1)),
        ("clamp_min", lambda x: torch.clamp_min(x, 0), (0,)),
        ("clamp_max", lambda x: x.clamp(max=0), (0,)),
        ("clamp between tensors", lambda x: x.clamp(torch.zeros(4), x.detach() + 1), (0,)),
        ("clamp of a bound", lambda x: torch.clamp(x.detach(), x, x + 1), (0,)),
        ("maximum", lambda x: torch.maximum(x, x[:, :1] * 2), (0,)),
        ("max", torch.max, (0,)),
        ("max of an axis", lambda x: x.max(-1)[0], (0,)),
        ("min of an axis", lambda x: x.min(0, keepdim=True).values, (0,)),
        ("amax", lambda x: x.amax(-1), (0,)),
        ("norm", lambda x: x.norm(dim=-1, keepdim=True) + x, (0, 1)),
        ("norm of all", torch.norm, (0, 1)),
        *((f"norm {p}", lambda x, p=p: x.norm(p, -1), (0, 2)) for p in (0, 1, 3, 0.5, torch.inf)),
        ("normalize", lambda x: F.normalize(x) + x, (0, 1)),
        ("matrix norm", torch.linalg.matrix_norm, (0, 1)),
        ("cosine_similarity", lambda x: F.cosine_similarity(x, x * 2), (0, 1)),
        ("pairwise_distance", lambda x: F.pairwise_distance(x, 2 * x, eps=0), (0,)),
        ("dist", lambda x: torch.dist(x, 2 * x), (0, 1)),
        *((f"cdist {p}", lambda x, p=p: torch.cdist(x, x, p), (0,)) for p in (1, 2, 3, torch.inf)),
        ("cdist of many", lambda x: torch.cdist(x.repeat(9, 1), x), (0, 1)),
        *((f"pdist {p}", lambda x, p=p: torch.pdist(x, p), (0,)) for p in (1, 2, 3, torch.inf)),
        ("fmax", lambda x: torch.fmax(x, x[:, :1] * 2), (0, torch.nan)),
        ("fmin", lambda x: torch.fmin(x[:, :1] * 2, x), (0, torch.nan)),
        ("cummax", lambda x: x.cummax(-1).values, (0, 1)),
        ("cummin", lambda x: x.cummin(0).values, (0, 1)),
        ("logcumsumexp", lambda x: x.logcumsumexp(-1), (0,)),
        ("median", torch.median, (0, 1)),
        ("median of an axis", lambda x: x.median(-1).values, (0, 1)),
        ("pow 0", lambda x: x + x**0 + x**0.0, (0, 1)),
        ("pow 2", lambda x: x**2 + x**1, (0,)),
        ("std", lambda x: x.std(-1), (0,)),
        ("std of all", torch.std, (0,)),
        ("atan2", lambda x: torch.atan2(x, x * 2), (0, 1)),
        ("l1_loss", lambda x: F.l1_loss(x, torch.zeros(3, 4)), (0,)),
        ("smooth_l1_loss", lambda x: F.smooth_l1_loss(x, torch.zeros(3, 4)), (0, 1)),
    ]
    for value in values
} | {
    "cdist of hidden states": lambda h, m: torch.cdist(h, h),
    "norm of hidden states": lambda h, m: h.norm(3, dim=(0, 1)),
    "std of hidden states": lambda h, m: h.std(0, correction=0, keepdim=True),
    "max of hidden states": lambda h, m: h.max(0)[0] * h.min(0)[1],
}

KEYWORDS: dict[str, Case] = {
    "linear": lambda h, m: F.linear(input=h, weight=m.l.weight, bias=m.l.bias),
    "matmul": lambda h, m: torch.matmul(input=h, other=m.l.weight),
    "a matmul of a tensor": lambda h, m: h.matmul(other=m.l.weight),
    "attention": lambda h, m: F.scaled_dot_product_attention(
        query=h[None, None], key=h[None, None], value=h[None, None]
    ),
    "interpolate": lambda h, m: F.interpolate(h.view(1, 1, 3, 4), size=5, mode="bicubic"),
    "embedding": lambda h, m: F.embedding(input=torch.tensor([0, 1]), weight=m.l.weight) + h[:2],
    "new_tensor": lambda h, m: h * h.new_tensor(2.0),
    "new_tensor of a list": lambda h, m: h * h.new_tensor(data=[1, 2, 3, 4]),
    "new_tensor of another dtype": lambda h, m: h * h.new_tensor([1.5] * 4, dtype=torch.int32),
    "cross entropy of constants": lambda h, m: F.cross_entropy(
        input=h, target=torch.tensor([0, -100, 2]), label_smoothing=0.1
    ),
    "negative log-likelihood": lambda h, m: F.nll_loss(h, torch.tensor([0, 1, 2])),
    "solve": lambda h, m: torch.linalg.solve(A=m.l.weight, B=m.l.weight * 2 + 1) + h[:1],
    "solve for a vector": lambda h, m: torch.linalg.solve(m.l.weight, h[0]),
    "norm": lambda h, m: torch.norm(input=h, p=2, dim=-1),
    "clamp": lambda h, m: torch.clamp(input=h, min=0.0, max=1.0),
}

# Functions whose `backward` is their own.
DERIVED: dict[str, Case] = {
    "rounded": lambda h, m: Rounded.apply(h * 3),
    "reversed": lambda h, m: Reversed.apply(h, 2.0) + h**2,
    "of a weight": lambda h, m: h @ Rounded.apply(m.l.weight * 4),
    "a saved result": lambda h, m: Saved.apply(h) * h,
    "a saved result that was written": lambda h, m: Written.apply(h, h > 0),
    "two results": lambda h, m: sum(Pair.apply(h)),
    "a function of a function": lambda h, m: Reversed.apply(Rounded.apply(h), 1.0),
    "a checkpoint": lambda h, m: torch.utils.checkpoint.checkpoint(m.l, h, use_reentrant=True),
}


@functools.lru_cache(1)
def make_table(n: int, device: Any) -> torch.Tensor:
    """Makes numbers, which are the same for each model."""
    return torch.arange(n, device=device) + 1.5


# What depends on no argument: it may be read, and kept from one call to the next.
CONSTANTS: dict[str, Case] = {
    "a number": lambda h, m: h * int(torch.ones(3).sum()),
    "a condition": lambda h, m: h * 2 if torch.arange(3).max() > 1 else h,
    "a mask": lambda h, m: h[:, torch.ones(4).cumsum(0) > 2],
    "a list": lambda h, m: (
        h * written(put(slice(1, None), 2), torch.zeros_like)(torch.arange(4.0), m).tolist()[1]
    ),
    "a cached table": lambda h, m: h * make_table(h.shape[1], h.device),
    "a scalar that widens": lambda h, m: h.sum().bfloat16() * torch.tensor(1.001),
    "a scalar that does not": lambda h, m: (h.bfloat16() * torch.tensor(1.001)).float(),
    "offsets": lambda h, m: (
        h[:2] * F.embedding_bag(torch.tensor([0, 1, 2]), h, torch.tensor([0, 1]))
    ),
    "bags of weights": lambda h, m: bags(h, "sum", per_sample_weights=h.exp().reshape(-1)),
    "bags with padding": lambda h, m: bags(h, "mean", padding_idx=2),
    "bags with a last offset": lambda h, m: bags(h, "max", [0, 5, 5, 12], include_last_offset=True),
    "rows by how often": lambda h, m: F.embedding(
        torch.tensor([0, 1, 2, 2]), h, scale_grad_by_freq=True
    ),
    "indices along an axis": lambda h, m: h.take_along_dim(torch.tensor([[0], [1], [3]]), 1),
    "quantiles": lambda h, m: torch.quantile(h, torch.tensor([0.1, 0.5]), dim=1),
    "a first state": lambda h, m: torch.lstm(
        h[:, None],
        (torch.zeros(1, 1, 2),) * 2,
        [h[:2].repeat(4, 1), h[:2].repeat(2, 1).reshape(8, 2)],
        *(False, 1, 0.0, False, False, False),
    )[0],
    "powers of 0": lambda h, m: torch.pow(h * 0, torch.tensor([0.0, 1.0, 2.0, 3.0])) + h ** h.exp(),
    "a sum in another dtype": lambda h, m: (
        h * h.detach().bfloat16().expand(99, 3, 4).sum(0, dtype=torch.float)
    ),
    "a factor's inverse": lambda h, m: torch.cholesky_inverse(
        torch.linalg.cholesky(h.T @ h + torch.eye(4), upper=True), upper=True
    ),
    "no meta device": lambda h, m: h * (1 + h.is_meta),
}


def bags(h: torch.Tensor, mode: str, offsets: Any = (0, 3, 3, 8), **options: Any) -> torch.Tensor:
    """Looks up rows of `h` in bags, of which one is empty."""
    ids = torch.tensor([0, 1, 2, 2, 1, 0, 2, 2, 2, 0, 0, 1])
    return F.embedding_bag(ids, h, torch.tensor(offsets), mode=mode, **options)


def look_at(h: torch.Tensor, m: nn.Module) -> torch.Tensor:
    """Masks by a function of indices, as `transformers` does."""
    seen = h > 0
    is_seen = torch.vmap(lambda i, j: (j <= i) & seen[i, j], in_dims=(None, 0))
    with TransformGetItemToIndex():
        mask = torch.vmap(is_seen, in_dims=(0, None))(torch.arange(3), torch.arange(4))
    return torch.where(mask, h, -h)


VMAPS: dict[str, Case] = {
    "vmap": lambda h, m: torch.vmap(lambda x: x.exp() * 2)(h),
    "vmap of columns": lambda h, m: torch.vmap(lambda x: x.cumsum(0), in_dims=1, out_dims=1)(h),
    "vmap of a module": lambda h, m: torch.vmap(m.l)(h),
    "vmap of pairs": lambda h, m: torch.vmap(lambda x, y: x @ y, in_dims=(0, None))(h, h[0]),
    "vmap of a norm": lambda h, m: torch.vmap(torch.linalg.norm)(h - h.detach()) + h[:, 0],
    "vmap of a write": lambda h, m: torch.vmap(lambda x: (x * 1).mul_(2)[1:].exp_())(h),
    "vmap under no_grad": lambda h, m: h * within(no_grad(), lambda: torch.vmap(torch.exp)(h)),
    "vmap of detached": lambda h, m: torch.vmap(lambda x: x * x.detach())(h),
    "vmap of constants": lambda h, m: (
        h * torch.vmap(lambda i: torch.div(i, 2, rounding_mode="trunc"))(torch.arange(4))
    ),
    "vmap of indices": look_at,
}

FUNCTIONS = STOPS | WRITES | KINKS | KEYWORDS | DERIVED | CONSTANTS | VMAPS


generator = torch.Generator()
DRAWS: dict[str, Case] = {
    "rand": lambda h, m: h + torch.rand(3, 4),
    "randn": lambda h, m: h + torch.randn(3, 4, device=h.device),
    "randint": lambda h, m: h + torch.randint(3, (4,)),
    "randperm": lambda h, m: h[torch.randperm(3)],
    "normal": lambda h, m: h + torch.normal(0.0, 1.0, (4,)),
    "rand_like": lambda h, m: torch.rand_like(h),
    "bernoulli": lambda h, m: torch.bernoulli(h.sigmoid()),
    "bernoulli of a constant": lambda h, m: h * torch.bernoulli(torch.full((4,), 0.5)),
    "multinomial": lambda h, m: torch.multinomial(h.softmax(-1), 1),
    "dropout": lambda h, m: F.dropout(h, 0.5),
    "attention": lambda h, m: F.scaled_dot_product_attention(h, h, h, dropout_p=0.5),
    "gumbel_softmax": lambda h, m: F.gumbel_softmax(h),
    "rrelu": lambda h, m: F.rrelu(h, training=True),
    "a generator": lambda h, m: torch.empty_like(h).uniform_(generator=generator),
    "a generator of PyTorch's": lambda h, m: h + torch.rand(4, generator=generator),
    **{
        name: lambda h, m, name=name: getattr(h * 1, name)()
        for name in ("normal_", "uniform_", "exponential_", "cauchy_", "bernoulli_", "random_")
    },
    "empty().normal_": lambda h, m: h + torch.empty(4).normal_(),
}

GRADIENTS: dict[str, Case] = {
    "a hook": lambda h, m: (h.register_hook(lambda g: g * 2), h)[1],
    "grad": lambda h, m: torch.autograd.grad(h.sum(), h)[0],
    "backward": lambda h, m: h.sum().backward() or h,
    "a question": lambda h, m: h * (1 + h.requires_grad),
    "a question of a weight": lambda h, m: h * (1 + m.l.weight.requires_grad),
}
