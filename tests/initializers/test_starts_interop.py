"""Starts against the real PEFT on PyTorch, and bitsandbytes. Needs the extra `interop`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
hf_peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")

import laws  # noqa: E402
from small import dense, set_up  # noqa: E402

import jlora  # noqa: E402
from jlora import arithmetic, initializers, peft  # noqa: E402

INPUTS, OUTPUTS, RANK = 48, 32, 4
NAMES = [peft.Name("w", "0", "io")]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def decaying(inputs: int, outputs: int, share: float = 0.8) -> np.ndarray:
    """A matrix whose singular vectors float32 tells apart: each value is a share of the last."""
    u, v = (np.linalg.qr(normal(n, outputs))[0] for n in (inputs, outputs))
    return ((u * share ** np.arange(outputs)) @ v.T).astype(np.float32)


def array(x: Any) -> np.ndarray:
    return x.detach().numpy()


def close(actual: Any, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """To `tolerance` of the largest."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def layer_of(w: np.ndarray) -> Any:
    """A model of one layer, of the name 0."""
    layer = torch.nn.Linear(*w.shape, bias=False)
    layer.weight.data = torch.from_numpy(w.T.copy())
    return torch.nn.Sequential(layer)


def in_both(init: Any, name: Any, w: np.ndarray, **options: Any) -> tuple[Any, Any, Any, Any]:
    """PEFT's model of one layer that starts by `name`, and our transform, base and adapter."""
    config = hf_peft.LoraConfig(
        r=RANK,
        lora_alpha=6,
        target_modules=["0"],
        init_lora_weights=name,
        use_rslora=options.get("rslora", False),
    )
    model = hf_peft.get_peft_model(layer_of(w), config)
    rule = jlora.LoRA("w", rank=RANK, alpha=6, init=init, **options)
    lora = jlora.transform(dense, rule)
    return model, lora, *lora.init(jax.random.key(0), {"w": jnp.asarray(w)}, normal(1, INPUTS))


@pytest.mark.parametrize("name", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_same_part_and_the_same_rest(name: str, rslora: bool, tmp_path: Any) -> None:
    """PEFT reads the difference as an adapter for the model as it was, of twice the rank."""
    w, x = decaying(INPUTS, OUTPUTS), normal(5, INPUTS)
    model, lora, base, initial = in_both(getattr(initializers, name), name, w, rslora=rslora)
    layer = model.base_model.model[0]
    close(base["w"], array(layer.base_layer.weight).T)
    node = initial["w"]
    close(node.scale * node.a @ node.b, array(layer.get_delta_weight("default")).T)

    trained, params = laws.randomize(initial), {"w": jnp.asarray(w)}
    peft.save(tmp_path / "p", params, arithmetic.difference(trained, initial), NAMES)
    model = hf_peft.PeftModel.from_pretrained(layer_of(w), tmp_path / "p")
    assert model.peft_config["default"].r == 2 * RANK
    close(array(model(torch.from_numpy(x))), np.asarray(lora.apply(base, trained, x)))


def test_iterations_as_pefts() -> None:
    """Both find the exact part; PEFT iterates on no more columns than the rank, and needs more."""
    w = decaying(INPUTS, OUTPUTS, 0.5)
    model, _, base, _ = in_both(initializers.pissa_niter(16), "pissa_niter_16", w)
    close(base["w"], array(model.base_model.model[0].base_layer.weight).T)


@pytest.mark.parametrize("inputs", [48, 50])
def test_miss(inputs: int, tmp_path: Any) -> None:
    """Values and gradients, also where the rank does not divide the inputs; files are LoRA's."""
    w, x = normal(inputs, OUTPUTS), normal(5, inputs)
    config = hf_peft.MissConfig(r=RANK, target_modules=["0"], init_weights=False)
    model = hf_peft.get_peft_model(layer_of(w), config)
    [block] = [p for n, p in model.named_parameters() if "miss_block" in n]
    y = model(torch.from_numpy(x))
    torch.sin(y).sum().backward()

    rule = jlora.LoRA("w", rank=RANK, alpha=RANK, init=initializers.miss)
    lora, base, adapter = set_up(dense, rule, {"w": jnp.asarray(w)}, x)
    adapter = {"w": adapter["w"]._replace(b=jnp.asarray(array(block)))}
    close(lora.apply(base, adapter, x), array(y))
    grads = jax.grad(lambda a: jnp.sin(lora.apply(base, a, x)).sum())(adapter)
    close(grads["w"].b, array(block.grad))
    close(jlora.merge(base, adapter)["w"], array(model.merge_and_unload()[0].weight).T)
    peft.save(tmp_path / "p", base, adapter, NAMES)
    model = hf_peft.PeftModel.from_pretrained(layer_of(w), tmp_path / "p")
    close(array(model(torch.from_numpy(x))), array(y))


def test_paca(tmp_path: Any) -> None:
    """The gradient of B is that of some columns of PyTorch's W; PEFT has it as a LoRA."""
    w, x = normal(INPUTS, OUTPUTS), normal(5, INPUTS)
    rule = jlora.LoRA("w", rank=RANK, alpha=6, init=initializers.paca)
    lora, base, adapter = set_up(dense, rule, {"w": jnp.asarray(w)}, x)
    layer = layer_of(w)
    torch.sin(layer(torch.from_numpy(x))).sum().backward()
    columns = array(layer[0].weight.grad)[:, np.asarray(adapter["w"].a).argmax(0)]
    grads = jax.grad(lambda a: jnp.sin(lora.apply(base, a, x)).sum())(adapter)
    close(grads["w"].b, 6 / RANK * columns.T)

    adapter = {"w": adapter["w"]._replace(b=jnp.asarray(normal(RANK, OUTPUTS)))}
    peft.save(tmp_path / "p", base, adapter, NAMES)
    model = hf_peft.PeftModel.from_pretrained(layer_of(w), tmp_path / "p")
    close(array(model(torch.from_numpy(x))), np.asarray(lora.apply(base, adapter, x)))


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_loftq(iterations: int) -> None:
    """PEFT's loop, which needs a GPU there, with bitsandbytes' codes; its last iteration.

    A value between two codes may go to either, and each iteration makes more of it.
    """
    w = normal(256, 64)

    def start(iterations: int) -> tuple[np.ndarray, np.ndarray]:
        init = initializers.loftq(jlora.NF4(double=False), iterations)
        lora = jlora.transform(dense, jlora.LoRA("w", rank=RANK, alpha=6, init=init))
        base, adapter = lora.init(jax.random.key(0), {"w": jnp.asarray(w)}, normal(1, 256))
        node = adapter["w"]
        return np.asarray(jlora.dequantize(base)["w"]), np.asarray(node.scale * node.a @ node.b)

    before = start(iterations - 1)[1] if iterations > 1 else np.zeros_like(w)
    codes = bnb.functional.dequantize_4bit(
        *bnb.functional.quantize_4bit(torch.from_numpy((w - before).T.copy()), quant_type="nf4")
    )
    plain, change = start(iterations)
    other = np.abs(plain - array(codes).T) > 1e-3
    assert other.mean() < 1e-3
    u, s, vt = torch.linalg.svd(torch.from_numpy(w - plain), full_matrices=False)
    close(change, array(u[:, :RANK] * s[:RANK] @ vt[:RANK]), 1e-3)
