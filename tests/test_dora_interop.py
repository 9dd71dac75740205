"""DoRA against the real PEFT on PyTorch. Needs the extra `interop`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
hf_peft = pytest.importorskip("peft")

import jlora  # noqa: E402

# What PyTorch and its libraries warn of is theirs.
pytestmark = pytest.mark.filterwarnings("default")

RANK, ALPHA = 3, 5


class Kind(NamedTuple):
    """A layer in both, and PEFT's axes in the order of jlora's.

    Attributes:
        layer: the module.
        x: its input.
        apply: the same of `(w, x)` in JAX.
        w: how the weight of the module is W.
        a: how PEFT's A is jlora's.
        b: how PEFT's B is jlora's.
    """

    layer: Any
    x: np.ndarray
    apply: Any
    w: tuple[int, ...]
    a: tuple[int, ...] = (1, 0)
    b: tuple[int, ...] = (1, 0)


def convolution(w: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "VALID", dimension_numbers=("NCHW", "HWIO", "NCHW")
    )


def kinds() -> dict[str, Kind]:
    """Fresh modules with random weights."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    ids = rng.integers(0, 11, (2, 7))
    return {
        "linear": Kind(torch.nn.Linear(8, 6, bias=False), normal(4, 8), lambda w, x: x @ w, (1, 0)),
        "conv": Kind(
            torch.nn.Conv2d(4, 6, (3, 2), bias=False),
            normal(2, 4, 7, 5),
            convolution,
            (2, 3, 1, 0),
            (2, 3, 1, 0),
        ),
        "embedding": Kind(torch.nn.Embedding(11, 6), ids, lambda w, x: w[x], (0, 1)),
    }


def array(x: Any) -> np.ndarray:
    return x.detach().numpy()


@pytest.mark.parametrize("name", ["linear", "conv", "embedding"])
def test_values_gradients_and_merged_weights(name: str) -> None:
    """As PEFT has them, in float32 to 1e-6 of the largest."""
    torch.manual_seed(0)
    kind = kinds()[name]
    config = hf_peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["0"], use_dora=True, init_lora_weights=False
    )
    model = hf_peft.get_peft_model(torch.nn.Sequential(kind.layer), config)
    trained = {n: p for n, p in model.named_parameters() if "lora_" in n}
    for p in trained.values():  # so that m is not the norm
        p.data += 0.1 * torch.rand_like(p)
    y = model(torch.from_numpy(kind.x))
    torch.sin(y).sum().backward()

    w = jnp.asarray(array(kind.layer.weight).transpose(kind.w))
    dora = jlora.transform(
        lambda p, x: kind.apply(p["w"], x), jlora.DoRA("w", rank=RANK, alpha=ALPHA)
    )
    base, adapter = dora.init(jax.random.key(0), {"w": w}, jnp.asarray(kind.x))
    node = adapter["w"]

    def ours(of: Any) -> dict[str, Any]:
        """The tensors of PEFT as the arrays of our node."""
        a, b, m = (
            next(array(of(p)) for n, p in trained.items() if part in n)
            for part in ("_A", "_B", "magnitude")
        )
        b = b.reshape(b.shape[:2]).transpose(kind.b)
        return {"a": a.transpose(kind.a), "b": b, "m": m.reshape(node.m.shape)}

    node = node._replace(**jax.tree.map(jnp.asarray, ours(lambda p: p)))

    def loss(node: Any) -> tuple[jax.Array, jax.Array]:
        y = dora.apply(base, {"w": node}, jnp.asarray(kind.x))
        return jnp.sin(y).sum(), y

    grads, actual = jax.grad(loss, has_aux=True)(node)
    merged = jlora.merge(base, {"w": node})["w"]
    close(actual, array(y))
    for part, expected in ours(lambda p: p.grad).items():
        close(getattr(grads, part), expected)
    close(merged, array(model.merge_and_unload()[0].weight).transpose(kind.w))


def close(actual: Any, expected: np.ndarray) -> None:
    """To a few roundings of the largest."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_starts_with_the_same_magnitudes() -> None:
    for kind in kinds().values():
        config = hf_peft.LoraConfig(r=RANK, target_modules=["0"], use_dora=True)
        model = hf_peft.get_peft_model(torch.nn.Sequential(kind.layer), config)
        expected = next(array(p) for n, p in model.named_parameters() if "magnitude" in n)
        w = jnp.asarray(array(kind.layer.weight).transpose(kind.w))
        dora = jlora.transform(lambda p, x, f=kind.apply: f(p["w"], x), jlora.DoRA("w", rank=RANK))
        _, adapter = dora.init(jax.random.key(0), {"w": w}, jnp.asarray(kind.x))
        close(adapter["w"].m, expected.ravel())
