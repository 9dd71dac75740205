"""NF4, FP4 and Int8 against bitsandbytes, to a bit."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import every

import jlora

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # its kernels would be compiled, for minutes
torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")

SCHEMES = {"nf4": jlora.NF4, "fp4": jlora.FP4}
SHAPES = [(128, 192), (7, 64), (33, 50), (5, 13), (1, 3), (3, 128), (65, 1)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def weight(shape, dtype, zeros=True):
    """W as jlora has it, (inputs, outputs), and as PyTorch has it, of the same bits."""
    rng = np.random.default_rng(0)
    w = torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(DTYPES[dtype])
    if zeros and w.numel() > 300:
        w.view(-1)[64:256] = 0
    ours = jnp.asarray(w.float().numpy().T, dtype)
    return ours, w


def values_of(packed, codes, state):
    """What bitsandbytes makes of codes.

    Its kernel for AVX-512 takes scales of other blocks where rows are not whole blocks; there its
    own numbers and scales are multiplied here.
    """
    absmax = state.absmax.repeat_interleave(state.blocksize)[: codes.size]
    values = (state.code[torch.from_numpy(codes).long()] * absmax).to(state.dtype)
    values = values.reshape(state.shape)
    if state.shape[-1] % state.blocksize == 0:
        assert torch.equal(values, functional.dequantize_4bit(packed, state))
    return values


def codes_of(leaf):
    """The codes of a leaf in the order of a file, one a byte."""
    block, data = leaf.scheme.block, np.asarray(leaf.data)
    axis = data.ndim - 1 if leaf.form.flat else leaf.form.axis
    data = np.moveaxis(data, axis, -1)
    pairs = data.reshape(*data.shape[:-1], -1, block // 2)
    return np.concatenate([pairs >> 4, pairs & 15], -1).ravel()


UNDER = {"eager": lambda f: f, "jit": jax.jit}
DAILY = ("nf4", "float32", "eager"), ("nf4", "bfloat16", "jit"), ("fp4", "float16", "jit")


@pytest.mark.parametrize(("kind", "dtype", "under"), every(SCHEMES, DTYPES, UNDER, daily=DAILY))
def test_codes_scales_and_values(kind, dtype, under):
    under = UNDER[under]
    for shape in SHAPES:
        for block in (32, 64, 128, 256):
            ours, theirs = weight(shape, dtype)
            packed, state = functional.quantize_4bit(theirs, blocksize=block, quant_type=kind)
            scheme = SCHEMES[kind]("w", block=block, double=False)
            leaf = under(lambda w, scheme=scheme: jlora.quantize({"w": w}, scheme))(ours[:, :])["w"]
            pairs = packed.numpy().ravel()
            codes = np.stack([pairs >> 4, pairs & 15], -1).ravel()[: theirs.numel()]
            np.testing.assert_array_equal(codes_of(leaf)[: theirs.numel()], codes)
            absmax = np.asarray(leaf.scale).T.ravel()
            np.testing.assert_array_equal(absmax, state.absmax.numpy())
            values = under(jlora.dequantize)({"w": leaf})["w"]
            expected = values_of(packed, codes, state)
            assert values.dtype == dtype
            np.testing.assert_array_equal(
                np.asarray(values, np.float32).T, expected.float().numpy().reshape(shape)
            )


@pytest.mark.parametrize("under", UNDER.values(), ids=UNDER)
@pytest.mark.parametrize("shape", [(512, 640), (33, 50)])
def test_scales_of_scales(shape, under):
    """What its codes mean, to a bit; its own choice of codes is off by one where it is close."""
    ours, theirs = weight(shape, "float32", zeros=False)
    packed, state = functional.quantize_4bit(theirs, quant_type="nf4", compress_statistics=True)
    leaf = jlora.quantize({"w": ours}, jlora.NF4("w"))["w"]
    codes = np.asarray(leaf.scale).T.ravel().astype(int)
    assert np.abs(codes - state.absmax.numpy().astype(int)).max() <= 1
    assert (codes != state.absmax.numpy()).mean() < 0.01
    np.testing.assert_allclose(leaf.nested.offset, state.offset.item(), rtol=1e-6)
    nested = jlora._quantized.Nested(
        jnp.asarray(state.state2.absmax.numpy()), jnp.asarray(state.offset.numpy())
    )
    shaped = state.absmax.numpy().reshape(np.asarray(leaf.scale).T.shape).T
    leaf = jlora._quantized.Quantized(
        leaf.data, jnp.asarray(shaped), None, nested, None, leaf.scheme, leaf.form, leaf.dtype
    )
    values = under(jlora.dequantize)({"w": leaf})["w"]
    expected = functional.dequantize_4bit(packed, state)
    np.testing.assert_array_equal(np.asarray(values).T, expected.numpy())


@pytest.mark.parametrize("under", UNDER.values(), ids=UNDER)
def test_int8(under):
    ours, theirs = weight((96, 160), "float32")
    codes, absmax, _ = functional.int8_vectorwise_quant(theirs.half())
    ours = jnp.asarray(theirs.half().float().numpy().T)
    leaf = under(lambda w: jlora.quantize({"w": w}, jlora.Int8("w")))(ours)["w"]
    np.testing.assert_array_equal(np.asarray(leaf.data).T, codes.numpy())
    np.testing.assert_array_equal(leaf.scale, absmax.numpy())
    expected = functional.int8_vectorwise_dequant(codes, absmax)
    np.testing.assert_array_equal(
        np.asarray(under(jlora.dequantize)({"w": leaf})["w"]).T, expected.numpy()
    )
