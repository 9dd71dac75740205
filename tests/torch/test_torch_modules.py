"""`jlora.torch.extract` on modules of PyTorch: what is a leaf, what is refused, what stays."""

import dataclasses
import doctest
import functools
import gc
import warnings
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jlora.torch._apply")

import torch
from jax.sharding import PartitionSpec
from small import KEY, assert_close, set_up_noisy
from torch import nn
from torch_functions import Lambda

import jlora
from jlora import Full, LoRA
from jlora._tree import leaves_by_path, name_of
from jlora.torch import extract

# What torchax warns of is its own.
X = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
IDS = np.array([[1, 2, 0], [3, 0, 4]])


@dataclasses.dataclass
class Output:
    """What a model returns."""

    logits: Any
    hidden: tuple[Any, ...] | None = None


class Net(nn.Module):
    """A module with a bit of everything."""

    table: torch.Tensor
    mean: torch.Tensor

    def __init__(self) -> None:
        """Draws its parameters."""
        super().__init__()
        self.embed = nn.Embedding(5, 8, padding_idx=0)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 5, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("table", torch.randn(8), persistent=False)
        self.register_buffer("codes", torch.arange(3))
        self.plain = torch.randn(8)
        self.head.weight = self.embed.weight

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states."""
        h = self.embed(ids) * self.table + self.plain + self.codes[:, None]
        for layer in self.layers:
            h = torch.relu(layer(h))
        self.last = h  # as some models do
        return self.norm(h.transpose(1, 2)).transpose(1, 2)

    def forward(self, ids: torch.Tensor, scale: float = 1.0, twice: bool = False) -> Output:
        """Returns logits and, if asked for, the hidden states."""
        h = self.encode(ids) * scale
        return Output(self.head(h), (h, h) if twice else None)


def make() -> Any:
    torch.manual_seed(0)
    return Net().eval()


def paths(params: Any) -> list[str]:
    return [name_of(path) for path, _ in leaves_by_path(params)]


def test_leaves() -> None:
    """Parameters and saved buffers, each once; all else is constant."""
    params, apply = extract(make())
    assert paths(params) == [
        "codes",
        "embed/weight",
        *(f"layers/{i}/{name}" for i in (0, 1) for name in ("bias", "weight")),
        *(f"norm/{x}" for x in ("bias", "num_batches_tracked", "running_mean")),
        *(f"norm/{x}" for x in ("running_var", "weight")),
    ]
    assert apply.structure.tied == {"embed.weight": ("head.weight",)}


def test_outputs() -> None:
    """Of a method with static arguments, as a dataclass that JAX knows."""
    model = make()
    params, apply = extract(model)
    with torch.no_grad():
        expected = model(torch.as_tensor(IDS), 2.0, twice=True)
    found = jax.jit(lambda p, x: apply(p, x, 2.0, twice=True))(params, IDS)
    assert type(found) is Output
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-6)
    np.testing.assert_allclose(found.hidden[1], expected.hidden[1], atol=1e-6)
    keys = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(found)]
    assert keys == [".logits", ".hidden[0]", ".hidden[1]"]
    hidden = jax.jit(apply, static_argnames="method")(params, IDS, method="encode")
    np.testing.assert_allclose(hidden * 2, expected.hidden[0], atol=1e-6)


def test_adapted_is_merged() -> None:
    params, apply = extract(make())
    rules = LoRA("layers/0/weight|embed/weight", rank=2), Full("norm/weight")
    lora, base, adapter = set_up_noisy(apply, rules, params, IDS)
    merged = apply(jlora.merge(base, adapter), IDS)
    assert_close(lora.apply(base, adapter, IDS), merged)
    assert jnp.abs(merged.logits - apply(params, IDS).logits).max() > 0.1


def test_buffers_are_not_trained() -> None:
    """A rule that takes one raises; `LoRA()` passes over them."""
    params, apply = extract(make())
    for rule in (Full("norm/running_mean"), Full("norm"), Full("codes")):
        with pytest.raises(ValueError, match=r"Full.* (for|matches) '(norm|codes)"):
            jlora.transform(apply, rule).init(KEY, params, IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Explicitly requested dtype")
        sites = jlora.transform(apply, LoRA(rank=2)).sites(params, IDS)
    assert [s.path for s in sites if s.is_adapted] == ["layers/0/weight", "layers/1/weight"]


def test_padding() -> None:
    """The row of `padding_idx` gets no gradient, and is a site like the others."""
    model = make()
    params, apply = extract(model)
    ((model.encode(torch.as_tensor(IDS)) ** 2).sum()).backward()
    gradient = jax.grad(lambda p, q: (apply(p | q, IDS, method="encode") ** 2).sum())(
        {"embed": params["embed"]}, {k: x for k, x in params.items() if k != "embed"}
    )
    expected = model.embed.weight.grad
    np.testing.assert_allclose(gradient["embed"]["weight"], expected, atol=1e-5)
    assert not np.asarray(gradient["embed"]["weight"])[0].any()
    assert jlora.transform(apply).sites(params, IDS)["embed/weight"].kind == "embed"


def test_nothing_is_left() -> None:
    """In the module, in PyTorch, or of the module's memory."""
    model = make()
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    params, apply = extract(model)
    with pytest.raises(Exception, match="integer type"):
        apply(params, X)
    jax.jit(apply)(params, IDS)
    apply(params, IDS)
    assert type(torch.ones(2)) is torch.Tensor
    for name, m in model.named_modules():
        assert vars(m).keys() == before[name].keys()
    with torch.no_grad():
        model.head.weight.zero_()
    assert np.asarray(params["embed"]["weight"]).any()
    memory = weakref.ref(model.layers[0].weight)
    del model, before, m
    gc.collect()
    assert memory() is None
    jax.jit(apply)(params, IDS)


def test_meta() -> None:
    """Shapes; buffers that are not saved have values, or the model is refused."""
    with torch.device("meta"):
        model = Net().eval()
    with pytest.raises(ValueError, match="buffers on the meta device") as caught:
        extract(model)
    assert [x.where for x in caught.value.problems] == ["table", "plain"]
    values = make()
    model.table, model.plain = values.table, values.plain
    shapes, abstract = extract(model)
    params, apply = extract(values)
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert shapes == types
    assert_close(abstract(params, IDS), apply(params, IDS))
    assert jax.eval_shape(abstract, shapes, IDS).logits.shape == (2, 3, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.bool])
def test_values_are_copied_bit_for_bit(dtype: Any) -> None:
    model = nn.Linear(3, 2).eval()
    model.register_buffer("x", torch.tensor([[1.0, -0.3], [0.0, 2.5]]).to(dtype).T)
    params, _ = extract(model)
    assert params["x"].shape == (2, 2)
    np.testing.assert_array_equal(np.asarray(params["x"], np.float32), model.x.float().numpy())


def test_constants_of_pytorch() -> None:
    """They mix with arrays, and a scalar does not widen them."""
    x = jnp.arange(3, dtype=jnp.bfloat16)
    doubled = Lambda(lambda _, x: x[..., torch.arange(2).flip(0)] * torch.tensor(2.0))
    found = jax.jit(extract(doubled.eval())[1])({}, x)
    assert found.dtype == jnp.bfloat16
    assert found.tolist() == [2, 0]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape, dtype=np.float32)


QUERY, KEY_4, GROUPED = normal(2, 4, 5, 8), normal(2, 4, 6, 8), normal(2, 2, 6, 8)
SEEN = np.tri(5, 6, dtype=bool)
HIDDEN = np.tri(5, 6, -1, dtype=bool)  # from the first query
ATTENTION: dict[str, tuple[tuple[np.ndarray, np.ndarray, np.ndarray], dict[str, Any]]] = {
    "plain": ((QUERY, KEY_4, -KEY_4), {"scale": 0.3}),
    "causal": ((QUERY, KEY_4, -KEY_4), {"is_causal": True}),
    "grouped": ((QUERY, GROUPED, -GROUPED), {"enable_gqa": True, "is_causal": True}),
    "each in groups": ((QUERY, GROUPED, normal(2, 1, 6, 8)), {"enable_gqa": True}),
    "one head of keys": ((QUERY, normal(2, 1, 6, 8), KEY_4), {}),
    "masked": ((QUERY, KEY_4, -KEY_4), {"attn_mask": SEEN[None, None]}),
    "mask of two axes": ((QUERY, KEY_4, -KEY_4), {"attn_mask": SEEN}),
    "no key": ((QUERY, KEY_4, -KEY_4), {"attn_mask": HIDDEN}),
    "no key, larger values": ((QUERY, KEY_4, normal(2, 4, 6, 10)), {"attn_mask": HIDDEN}),
    "bias": ((QUERY, KEY_4, -KEY_4), {"attn_mask": normal(1, 4, 5, 6)}),
    "larger values": ((QUERY, KEY_4, normal(2, 4, 6, 10)), {}),
    "three axes": ((QUERY[0], KEY_4[0], -KEY_4[0]), {"is_causal": True}),
    "queries of one row": ((QUERY[:1], KEY_4, -KEY_4), {"attn_mask": SEEN}),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case: str, dtype: Any) -> None:
    """Of 64 bits its softmax is too."""
    is_array = lambda x: isinstance(x, np.ndarray)  # noqa: E731
    cast = lambda x: x.astype(dtype) if is_array(x) and x.dtype != bool else x  # noqa: E731
    heads, options = jax.tree.map(cast, ATTENTION[case])
    attend = nn.functional.scaled_dot_product_attention
    model = Lambda(lambda _, *heads, **options: attend(*heads, **options)).eval()
    mask = {k: torch.as_tensor(x) for k, x in options.items() if is_array(x)}
    expected = attend(*map(torch.as_tensor, heads), **(options | mask))
    with jax.enable_x64(dtype == np.float64):
        found = extract(model)[1]({}, *heads, **options)
    np.testing.assert_allclose(found, expected, atol=32 * np.finfo(dtype).eps)


def test_products_keep_their_axes() -> None:
    """PyTorch's own would merge those of the batch, which a mesh cannot shard."""
    x, y = normal(2, 4, 5, 8), normal(2, 4, 8, 3)
    model = Lambda(lambda _, x, y: x @ y + torch.matmul(x, y) + x.matmul(y))
    apply = extract(model.eval())[1]
    np.testing.assert_allclose(apply({}, x, y), 3 * (x @ y), atol=1e-5)
    assert "reshape" not in str(jax.make_jaxpr(apply)({}, x, y))


def test_activations() -> None:
    """The outputs of the modules that a pattern names are constrained, and no others."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    model = make()
    params, apply = extract(model, {r"layers/\d": PartitionSpec("data")})
    assert not any(m._forward_hooks for m in model.modules())
    with jax.set_mesh(mesh):
        text = str(jax.make_jaxpr(apply)(params, IDS))
    assert text.count("sharding_constraint[") == 2
    with pytest.raises(ValueError, match=r"`activations` has 'layer/0', which matches no module"):
        extract(make(), {"layer/0": PartitionSpec()})


def test_example() -> None:
    """That of the docstring, which is skipped where PyTorch is not installed."""
    [example] = doctest.DocTestFinder(recurse=False).find(extract, "extract")
    for line in example.examples:
        line.options.clear()
    assert doctest.DocTestRunner().run(example) == (0, len(example.examples))


def split(_: Any, x: torch.Tensor, sizes: Any) -> list[torch.Tensor]:
    """Adds the rows of each part, and changes the sizes."""
    parts = x.split([int(n) for n in sizes])
    sizes[0] = 0
    return [part.sum(0) for part in parts]


SIZES = [1, 2]


def move(m: Any, ids: torch.Tensor) -> torch.Tensor:
    """Moves what it computes to the device of an argument."""
    hidden = m.embed(ids).to(ids.device)
    return m.head(hidden.to(ids.device, torch.float32)).to("cpu")


@pytest.mark.parametrize(
    "ids", [torch.tensor(IDS), IDS, jnp.asarray(IDS)], ids=["torch", "np", "jax"]
)
def test_devices_of_arguments(ids: Any) -> None:
    """JAX decides where arrays are: a static argument is on PyTorch's CPU, and takes none there."""
    model = Lambda(move, embed=nn.Embedding(5, 8), head=nn.Linear(8, 4)).eval()
    params, apply = extract(model)
    call = functools.partial(apply, ids=ids)
    lora, base, adapter = set_up_noisy(call, LoRA("head/weight", rank=2), params)
    grads = jax.grad(lambda a: (lora.apply(base, a) ** 2).sum())(adapter)
    assert all(np.any(x) for x in jax.tree.leaves(grads))
    expected = model(torch.tensor(IDS)).detach().numpy()
    assert_close(apply(params, ids), expected)


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_static_arguments(kind: Any) -> None:
    """They have values for the model under `jax.jit` too, and stay as they are."""
    sizes = kind(SIZES)
    apply = functools.partial(extract(Lambda(split).eval())[1], sizes=sizes)
    first, second = jax.jit(apply)({}, X[0])
    np.testing.assert_allclose(first, X[0, :1].sum(0), rtol=1e-6)
    np.testing.assert_allclose(second, X[0, 1:].sum(0), rtol=1e-6)
    assert [int(n) for n in sizes] == SIZES


def test_refused() -> None:
    """What is no function of the arguments, and what is no array."""
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module; got dict\."):
        extract({})  # pyright: ignore[reportArgumentType]
    model = make()
    model.norm.train()
    with pytest.raises(ValueError, match=r"in training mode .* Call model.eval\(\).*mode: norm\."):
        extract(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        normed = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2))).eval()
    with pytest.raises(ValueError, match=r"without a shape, such as 0\.weight\.\nCall it once"):
        extract(nn.Sequential(nn.LazyLinear(3)).eval())
    exported = torch.export.export(nn.Linear(4, 2).eval(), (torch.ones(1, 4),)).module()
    assert extract(exported)[1](extract(exported)[0], np.ones((1, 4), np.float32)).shape == (1, 2)
    with pytest.raises(TypeError, match=r"`remat` must be a dict .* got list\."):
        extract(nn.Linear(3, 2).eval(), remat=["layers"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"(?s)0\.weight: is computed.*parametrizations, or call"):
        extract(normed)
    nn.utils.remove_weight_norm(normed[0])
    extract(normed)
    big = nn.Linear(3, 2).eval()
    big.register_buffer("primes", torch.tensor([31, 2**40 + 15]), persistent=False)
    with pytest.raises(ValueError, match=r"integers in primes that int32 cannot hold. Set jax_ena"):
        extract(big)
    with pytest.raises(TypeError, match=r"of type Identity at output\['cache'\], which"):
        extract(Lambda(lambda _, x: {"cache": nn.Identity()}).eval())[1]({}, X)
    params, apply = extract(make())
    with pytest.raises(RuntimeError, match="Missing key"):
        apply({**params, "head": {}, "norm": {}}, IDS)
