"""`peft.load_base`: each format by its formula in NumPy, files that lie, and GGUF."""

import contextlib
import json
import shutil
import struct
import sys
from collections.abc import Callable
from functools import partial

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import refused
from safetensors.numpy import load_file, save_file
from small import some

import jlora
from jlora import peft
from jlora._quantized import DYNAMIC
from jlora.peft.formats._dequantize import matrices
from tests.peft.test_campaigns import campaign

E4M3 = jnp.float8_e4m3fn
MXFP4 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
ROWS, COLUMNS = 64, 128  # outputs and inputs of a matrix
NAMES = (
    peft.Name(r"layers/(\w+)/kernel", r"h.{}.\1", "lio"),
    peft.Name(r"layers/(\w+)/experts", r"h.{}.\1", "leio", "w", transposed=True),
    peft.Name(r"(\w+)/kernel", r"\1", "io"),
    peft.Name(r"norm/scale", "norm", "o"),
)


def draw(*shape, low=0, high=16, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def scales(*shape, seed=1, dtype=np.float16):
    return (np.random.default_rng(seed).random(shape) / 8 + 0.01).astype(dtype)


def words(codes, order=None, bits=4):
    """Codes along the last axis as int32; number k of those of a word in place `order[k]`."""
    codes = codes.reshape(*codes.shape[:-1], -1, 32 // bits).astype(np.uint32)
    places = np.uint32(bits) * np.asarray(order or range(32 // bits), np.uint32)
    return np.bitwise_or.reduce(codes << places, -1).view(np.int32)


class File(dict):
    """Tensors of a module, its configuration, and the (outputs, inputs) matrix that they mean."""

    def __init__(self, config, matrix, dtype=None, **tensors):
        """Of tensors without the module's name; `dtype` is what the file says of the weight."""
        super().__init__(tensors)
        self.config, self.matrix, self.dtype = config, matrix, dtype


def grouped(codes, zero, scale, order):
    """(q - z)·s, by the group of each input."""
    zero, scale = np.asarray(zero, np.float32), np.asarray(scale, np.float32)
    return (codes - (zero[:, order] if zero.ndim else zero)) * scale[:, order]


def order_of(group, mixed):
    """The group of each input, next to each other or not."""
    order = np.arange(COLUMNS) // group
    return np.random.default_rng(9).permutation(order) if mixed else order


def gptq(seed=0, group=32, zeros="gptq", bits=4, half=False, mixed=False):
    top, groups, order = 2**bits, COLUMNS // group, order_of(group, mixed)
    codes, scale = draw(ROWS, COLUMNS, high=top, seed=seed), scales(ROWS, groups, seed=seed)
    zero = draw(ROWS, groups, low=1, high=top, seed=seed + 1)
    zero = np.full_like(zero, top // 2) if half else zero
    stored = zero - (zeros == "gptq")
    said = {"bits": bits, "group_size": group, "checkpoint_format": zeros, "desc_act": mixed}
    return File(
        {"quant_method": "gptq", **said},
        grouped(codes, zero, scale, order),
        qweight=np.ascontiguousarray(words(codes, bits=bits).T),
        qzeros=words(np.ascontiguousarray(stored.T), bits=bits),
        scales=np.ascontiguousarray(scale.T),
        g_idx=order.astype(np.int32),
    )


def awq(seed=0, group=64):
    codes, scale = draw(ROWS, COLUMNS, seed=seed), scales(ROWS, COLUMNS // group, seed=seed)
    zero = draw(ROWS, COLUMNS // group, seed=seed + 1)
    order = np.argsort([0, 2, 4, 6, 1, 3, 5, 7]).tolist()  # nibble k holds output [0, 2, …][k]
    return File(
        {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"},
        (codes - np.repeat(zero, group, 1).astype(np.float32)) * np.repeat(scale, group, 1),
        qweight=words(np.ascontiguousarray(codes.T), order),
        qzeros=words(np.ascontiguousarray(zero.T), order),
        scales=np.ascontiguousarray(scale.T),
    )


def compressed(seed=0, group=32, symmetric=True, bits=4, mixed=False, bytes=False, known=True):
    """With `bytes` the zero points are in a byte each, as older versions wrote them.

    An order of groups next to each other that is not `known` yet was written, too.
    """
    top, groups, order = 2**bits, COLUMNS // group, order_of(group, mixed)
    codes, scale = draw(ROWS, COLUMNS, high=top, seed=seed), scales(ROWS, groups, seed=seed)
    zero, scale = draw(ROWS, groups, high=top, seed=seed + 1), scale.astype(jnp.bfloat16)
    tensors = {
        "weight_packed": words(codes, bits=bits),
        "weight_scale": scale,
        "weight_shape": np.array([ROWS, COLUMNS], np.int64),
    }
    if bytes:
        tensors["weight_zero_point"] = (zero.astype(np.int16) - top // 2).astype(np.int8)
    elif not symmetric:
        packed = words(np.ascontiguousarray(zero.T), bits=bits).T
        tensors["weight_zero_point"] = np.ascontiguousarray(packed)
    if mixed or not known:
        tensors["weight_g_idx"] = order.astype(np.int32) if known else np.full(COLUMNS, -1, "i4")
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    used = top // 2 if symmetric and not bytes else zero
    return File(config, grouped(codes, used, scale, order), **tensors)


def int8(seed=0, zero=None, each=True):
    """W8A8, with a scale of each output or of all."""
    codes = draw(ROWS, COLUMNS, low=-128, high=128, dtype=np.int8, seed=seed)
    scale = scales(ROWS if each else 1, 1, dtype=jnp.bfloat16, seed=seed)
    tensors = {"weight": codes, "weight_scale": scale}
    if zero is not None:
        tensors["weight_zero_point"] = np.full(scale.shape, zero, np.int8)
    config = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    matrix = (codes - np.float32(zero or 0)) * scale.astype(np.float32)
    return File(config, matrix, **tensors)


def floats8(seed):
    return np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(E4M3)


def in_blocks(codes, grid, block):
    """Codes times the scale of their block."""
    rows, columns = min(block[0], ROWS), min(block[1], COLUMNS)
    each = np.repeat(np.repeat(np.float32(grid), rows, 0), columns, 1)[:ROWS, :COLUMNS]
    return codes.astype(np.float32) * each


def fp8(seed=0, block=(32, 32)):
    codes = floats8(seed)
    shape = -(-ROWS // block[0]), -(-COLUMNS // block[1])
    grid = scales(*shape, dtype=np.float32, seed=seed)
    config = {"quant_method": "fp8", "weight_block_size": list(block)}
    matrix = in_blocks(codes, grid, block)
    return File(config, matrix, weight=codes, weight_scale_inv=grid)


def fp8_at_once(config, shape, *, name="weight_scale", dtype=jnp.bfloat16, seed=0, **more):
    """With one scale, of the tensor or of each output."""
    codes, scale = floats8(seed), scales(*shape, dtype=dtype, seed=seed)
    matrix = codes.astype(np.float32) * scale.reshape(-1, 1).astype(np.float32)
    return File(config, matrix, weight=codes, **{name: scale}, **more)


def compressed_fp8_blocks(seed=0, block=(32, 32)):
    codes = floats8(seed)
    grid = scales(-(-ROWS // block[0]), -(-COLUMNS // block[1]), dtype=jnp.bfloat16, seed=seed)
    groups = {"group_0": {"weights": {"strategy": "block", "block_structure": list(block)}}}
    config = {"format": "float-quantized", "config_groups": groups}
    return File(COMPRESSED | config, in_blocks(codes, grid, block), weight=codes, weight_scale=grid)


def mxfp4(seed=0, experts=3):
    codes = draw(experts, ROWS, COLUMNS, seed=seed)
    scale = draw(experts, ROWS, COLUMNS // 32, low=118, high=126, seed=seed)
    pairs = codes.reshape(experts, ROWS, COLUMNS // 32, 16, 2)
    values = MXFP4[codes] * np.repeat(np.exp2(scale.astype(np.float32) - 127), 32, -1)
    return File(
        {"quant_method": "mxfp4"},
        values,
        w_blocks=(pairs[..., 0] | pairs[..., 1] << 4).astype(np.uint8),
        w_scales=scale,
    )


def four_bits(seed=0, kind="nf4", double=True, group=256):
    """Blocks of 64 along the whole matrix, two codes a byte, the first in the high bits."""
    codes, blocks = draw(ROWS, COLUMNS, seed=seed), ROWS * COLUMNS // 64
    table = np.asarray(TABLES[kind].table)
    absmax = scales(blocks, dtype=np.float32, seed=seed)
    state = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [ROWS, COLUMNS]}
    more = {}
    if double:
        eights, groups = draw(blocks, high=256, seed=seed), -(-blocks // group)
        nested, offset = scales(groups, dtype=np.float32, seed=seed), 0.0625
        absmax = DYNAMIC[eights] * np.repeat(nested, group)[:blocks] + np.float32(offset)
        said = {"blocksize": group, "dtype": "float32", "offset": offset}
        state |= {f"nested_{key}": value for key, value in said.items()}
        more = {"weight.nested_absmax": nested, "weight.nested_quant_map": np.asarray(DYNAMIC)}
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    pairs = codes.reshape(-1, 2)
    return File(
        {"quant_method": "bitsandbytes"},
        (table[codes].reshape(blocks, 64) * absmax[:, None]).reshape(ROWS, COLUMNS),
        jnp.bfloat16,
        weight=(pairs[:, :1] << 4 | pairs[:, 1:]),
        **{"weight.absmax": eights if double else absmax, "weight.quant_map": table, **more},
        **{f"weight.quant_state.bitsandbytes__{kind}": text},
    )


def eight_bits(seed=0):
    """A maximum of each row, by which codes are multiplied, over 127."""
    codes, absmax = draw(ROWS, COLUMNS, low=-127, high=128, dtype=np.int8, seed=seed), scales(ROWS)
    each = absmax.astype(np.float32)
    return File(
        {"quant_method": "bitsandbytes"},
        codes * each[:, None] * np.float32(1 / 127),
        weight=codes,
        SCB=each,
        weight_format=np.zeros((), np.uint8),
    )


def floats(seed=0):
    """Not quantized."""
    matrix = np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    return File({}, matrix, weight=matrix)


TABLES = {"nf4": jlora.NF4, "fp4": jlora.FP4}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
SCALAR = {"input_scale": np.ones((), np.float32), "dtype": np.float32}
ONE_SCALE = {"quant_method": "fp8", "weight_block_size": None}
FORMATS = {
    "gptq": gptq,
    "gptq_v2": partial(gptq, zeros="gptq_v2"),
    "gptq, all inputs": partial(gptq, group=COLUMNS),
    "gptq, 8 bits": partial(gptq, bits=8, half=True),
    "awq": awq,
    "compressed-tensors": compressed,
    "compressed-tensors, asymmetric": partial(compressed, symmetric=False),
    "compressed-tensors, asymmetric by bytes": partial(compressed, bytes=True),
    "compressed-tensors, no order yet": partial(compressed, known=False),
    "compressed-tensors, 8 bits": partial(compressed, bits=8),
    "compressed-tensors, 8 bits by output": partial(compressed, group=COLUMNS, bits=8),
    "int8 by output": int8,
    "int8 by tensor": partial(int8, each=False),
    "int8, zero points of 0": partial(int8, zero=0),
    "int8 by tensor, a zero point of 0": partial(int8, zero=0, each=False),
    "fp8": fp8,
    "fp8, uneven": partial(fp8, block=(512, 512)),
    "fp8 by tensor": partial(fp8_at_once, config={"quant_method": "fp8"}, shape=(), **SCALAR),
    "fp8 by tensor, inverse": partial(
        fp8_at_once, config=ONE_SCALE, shape=(1,), name="weight_scale_inv", dtype=np.float32
    ),
    "fbgemm": partial(fp8_at_once, {"quant_method": "fbgemm_fp8"}, (ROWS, 1), dtype=np.float32),
    "fp8 by output": partial(fp8_at_once, COMPRESSED, (ROWS, 1)),
    "compressed-tensors, fp8 by tensor": partial(fp8_at_once, COMPRESSED, (1,)),
    "compressed-tensors, fp8 in blocks": compressed_fp8_blocks,
    "mxfp4": mxfp4,
    "nf4": four_bits,
    "nf4, not double": partial(four_bits, double=False),
    "nf4, other groups": partial(four_bits, group=64),
    "fp4": partial(four_bits, kind="fp4"),
    "bitsandbytes, 8 bits": eight_bits,
}
# What no scheme has, and is dequantized.
DENSE = {
    "gptq, by activation": partial(gptq, mixed=True),
    "gptq, groups of 8": partial(gptq, group=8),
    "gptq, 8 bits, asymmetric": partial(gptq, bits=8),
    "gptq, 8 bits, by activation": partial(gptq, bits=8, half=True, mixed=True),
    "compressed-tensors, by activation": partial(compressed, mixed=True),
    "compressed-tensors, 8 bits, asymmetric": partial(compressed, bits=8, symmetric=False),
    "int8, zero points": partial(int8, zero=-3),
    "fp8, no squares": partial(fp8, block=(32, 64)),
    "fp8, blocks higher than all": partial(fp8, block=(10**12, 32)),
    "fp8, squares of 48": partial(fp8, block=(48, 48)),
    "compressed-tensors, fp8 in groups": partial(compressed_fp8_blocks, block=(1, 32)),
}


def tensors_of(modules):
    """Their tensors, and a norm that is not quantized."""
    found = {f"{m}.{name}": x for m, file in modules.items() for name, x in file.items()}
    found["norm.weight"] = np.ones(ROWS, np.float32)
    return {name: np.array(x, order="C") for name, x in found.items()}


def write(folder, modules, **config):
    """A folder with the tensors of modules by name."""
    folder.mkdir(parents=True)
    [first, *_] = modules.values()
    save_file(tensors_of(modules), folder / "model.safetensors")
    said = {"quantization_config": first.config | config}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def like(dtype=jnp.float32, kernel="kernel", shape=(2, COLUMNS, ROWS)):
    return {
        "layers": {"up": {kernel: jax.ShapeDtypeStruct(shape, dtype)}},
        "norm": {"scale": jax.ShapeDtypeStruct((ROWS,), jnp.float32)},
    }


def assert_rounded(actual, expected):
    """Equal but for a rounding of the dtype of `expected`, as another program does it."""
    assert actual.shape == expected.shape
    rtol = float(jnp.finfo(expected.dtype).eps)
    np.testing.assert_allclose(np.float32(actual), np.float32(expected), rtol=rtol)


@pytest.mark.parametrize("dtype", some([jnp.float32, jnp.bfloat16], jnp.float32))
@pytest.mark.parametrize("format", FORMATS | DENSE)
def test_stacked_layers(format, dtype, tmp_path):
    """Of each format: loaded, the weights by its formula; dequantized, and nothing else of it."""
    files = [(FORMATS | DENSE)[format](seed=seed) for seed in (0, 5)]
    folder = write(tmp_path / "base", {f"h.{i}.up": file for i, file in enumerate(files)})
    matrix = np.stack([np.moveaxis(f.matrix, -1, -2) for f in files])
    kernel = "experts" if format == "mxfp4" else "kernel"
    base = peft.load_base(folder, like(dtype, kernel, matrix.shape), NAMES)
    leaf = base["layers"]["up"][kernel]
    assert isinstance(leaf, jlora.Quantized) == (format in FORMATS)
    dtype = files[0].dtype or dtype
    assert leaf.dtype == dtype
    if format in DENSE:
        np.testing.assert_array_equal(leaf, matrix.astype(dtype))
    else:
        assert_rounded(leaf.array(jnp.float32), matrix)
        assert_rounded(leaf.array(), matrix.astype(dtype))

    found = peft.dequantize_checkpoint(folder, tmp_path / "dense")
    new = load_file(tmp_path / "dense" / "model.safetensors")
    keys = [f"h.{i}.up.{'w' if format == 'mxfp4' else 'weight'}" for i in range(2)]
    assert new.keys() == {*keys, "norm.weight"}
    for key, x in zip(keys, matrix, strict=True):
        expected = x if format == "mxfp4" else x.T
        assert_rounded(new[key], expected.astype(jnp.bfloat16))
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == {}
    assert [(m.name, m.shape) for m in found] == [(key, files[0].matrix.shape) for key in keys]
    assert found == matrices(folder)


@pytest.mark.parametrize("model", ["gpt2", "gpt_bigcode"])
def test_conv1d(model, tmp_path):
    """In codes it is a linear module; in floats its inputs are before its outputs."""
    folder = write(tmp_path / "base", {"h.0.c_proj": gptq()})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model}))
    peft.dequantize_checkpoint(folder, tmp_path / "dense")
    found = load_file(tmp_path / "dense" / "model.safetensors")["h.0.c_proj.weight"]
    matrix = gptq().matrix.T if model == "gpt2" else gptq().matrix
    assert_rounded(found, matrix.astype(jnp.bfloat16))
    names = [peft.Name("w", "h.0.c_proj", "io", transposed=model == "gpt2"), NAMES[-1]]
    base = peft.load_base(folder, {"w": jnp.zeros((COLUMNS, ROWS))} | {"norm": ONE["norm"]}, names)
    assert_rounded(base["w"].array(), gptq().matrix.T)


@pytest.mark.parametrize("double", [True, False])
def test_experts_of_bitsandbytes(double, tmp_path):
    """Their codes run along all of them; square ones do not tell inputs from outputs."""
    shape = (2, ROWS, ROWS)
    file = four_bits(double=double)
    file |= {key: state(shape=shape)(file[key]) for key in file if "quant_state" in key}
    folder, like = write(tmp_path / "base", {"up": file}), {"w": jnp.zeros(shape)}
    names = [peft.Name("w", "up", "eoi", "weight"), NAMES[-1]]
    like |= {"norm": ONE["norm"]}
    leaf = peft.load_base(folder, like, names)["w"]
    assert isinstance(leaf, jlora.Quantized)
    expected = file.matrix.reshape(shape)
    assert_rounded(leaf.array(jnp.float32), expected)
    names[0] = peft.Name("w", "up", "eio", "weight", transposed=True)
    with refused(ValueError, "path", "up.weight", "but `names` changes the values"):
        peft.load_base(folder, like, names)
    peft.dequantize_checkpoint(folder, tmp_path / "dense")
    new = load_file(tmp_path / "dense" / "model.safetensors")["up.weight"]
    assert_rounded(new, expected.astype(jnp.bfloat16))


# Files by module, the rows of the leaves, and the values of these.
Laid = tuple[dict[str, File], list[peft.Name], dict[str, np.ndarray]]


def parts_of_experts(alternating: bool) -> Laid:
    """Gate and up of gpt-oss have the codes of every second output of one parameter."""
    file = mxfp4()
    options = {"transposed": True, "is_transposed": True, "alternating": alternating}
    names = [peft.Name(x, "up", "eio", "w", part=(j, 2), **options) for j, x in enumerate("ab")]
    halves = (slice(0, None, 2), slice(1, None, 2)) if alternating else (slice(32), slice(32, 64))
    values = [file.matrix[:, half].swapaxes(1, 2) for half in halves]
    return {"up": file}, names, dict(zip("ab", values, strict=True))


def experts_one_by_one(make: Callable[..., File], is_one_leaf: bool = False) -> Laid:
    """As DeepSeek ships them: a leaf has what is stored of all, a part each or both."""
    names, files, values = [], {}, {}
    for j, part in enumerate(("gate", "up")):
        each = {f"experts.{e}.{part}_proj": make(seed=2 * e + j) for e in range(2)}
        names.append(peft.Name(part, "experts", "eio", "gate_up_proj", part=(j, 2)))
        values[part] = np.stack([file.matrix.T for file in each.values()])
        files |= each
    if is_one_leaf:
        names = [peft.Name("both", "experts", "eio", "gate_up_proj")]
        values = {"both": np.concatenate([*values.values()], 2)}
    return files, names, values


def experts_before_layers() -> Laid:
    """As MaxText stacks them."""
    files = {f"h.{i}.up": mxfp4(seed=i) for i in range(2)}
    values = np.stack([file.matrix.swapaxes(1, 2) for file in files.values()], 1)
    return files, [peft.Name("w", "h.{}.up", "elio", "w", transposed=True)], {"w": values}


def parts_in_blocks_of_outputs() -> Laid:
    """Of codes whose blocks run on from one output to the next, experts before layers."""
    shape = (4, ROWS // 2, COLUMNS // 2)
    files = {f"h.{i}.up": four_bits(seed=i, double=False) for i in range(2)}
    for file in files.values():
        file |= {key: state(shape=shape)(file[key]) for key in file if "quant_state" in key}
    names = [peft.Name(x, "h.{}.up", "elio", "weight", part=(j, 2)) for j, x in enumerate("ab")]
    each = [file.matrix.reshape(shape).swapaxes(1, 2) for file in files.values()]
    values = np.split(np.stack(each, 1), 2, 3)
    return files, names, dict(zip("ab", values, strict=True))


def heads(*lengths: int) -> Laid:
    """Groups of 32 inputs, of which a head has more, as many, or less."""
    file = gptq()
    values = {"heads": file.matrix.T.reshape(*lengths, ROWS)}
    return {"out": file}, [peft.Name("heads", "out", "iio")], values


# Which leaves, and whether they are in codes; else they are dequantized.
LEAVES = {
    "alternating parts": (lambda: parts_of_experts(True), True),
    "parts": (lambda: parts_of_experts(False), True),
    "one by one": (lambda: experts_one_by_one(fp8), True),
    "one by one, in floats": (lambda: experts_one_by_one(floats), False),
    "one by one, as one leaf in floats": (lambda: experts_one_by_one(floats, True), False),
    "experts before layers": (experts_before_layers, True),
    "blocks of outputs": (parts_in_blocks_of_outputs, False),
    "blocks in heads": (lambda: heads(2, 64), True),
    "blocks as heads": (lambda: heads(4, 32), True),
    "blocks over heads": (lambda: heads(8, 16), False),
}


@pytest.mark.parametrize("case", LEAVES)
def test_leaves_in_codes(case, tmp_path):
    make, is_quantized = LEAVES[case]
    files, names, values = make()
    like = {x: jax.ShapeDtypeStruct(value.shape, jnp.float32) for x, value in values.items()}
    folder = write(tmp_path / "base", files)
    base = peft.load_base(folder, like | {"norm": ONE["norm"]}, [*names, NAMES[-1]])
    for x, value in values.items():
        assert isinstance(base[x], jlora.Quantized) == is_quantized
        assert_rounded(base[x].array() if is_quantized else base[x], value)
    if not any(file.config for file in files.values()):
        named = tensors_of(files), like | {"norm": ONE["norm"]}, [*names, NAMES[-1]]
        jax.tree.map(np.testing.assert_array_equal, peft.from_tensors(*named), base)


def test_codes_of_gate_and_up_are_no_one_leaf(tmp_path):
    """Of those that are stored one by one it cannot be made."""
    files, names, values = experts_one_by_one(fp8, True)
    like = {"both": jax.ShapeDtypeStruct(values["both"].shape, jnp.float32), "norm": ONE["norm"]}
    facts = "experts.gate_up_proj", "is stored in parts, which are quantized"
    with refused(ValueError, "path", *facts):
        peft.load_base(write(tmp_path / "base", files), like, [*names, NAMES[-1]])


# Values of 64 bits, the axes of their leaf, and whether 32 hold them: those of a count, of a large
# one, and of the positions of a window, which each layer has.
INTEGERS = [(7, "", True), (2**40, "", False), (np.arange(12).reshape(2, 2, 3), "olk", True)]


@pytest.mark.parametrize(("values", "axes", "fits"), INTEGERS, ids=["count", "large", "layers"])
def test_integers(values, axes, fits, tmp_path):
    """They get the dtype of their leaf, if that can hold them."""
    (tmp_path / "config.json").write_text("{}")
    values, module = np.array(values, np.int64), "h.{}" if "l" in axes else "h.0"
    each = values if "l" in axes else [values]
    save_file({f"h.{i}.index": x for i, x in enumerate(each)}, tmp_path / "model.safetensors")
    names = [peft.Name("index", module, axes, "index")]
    expected = values.swapaxes(0, 1) if "l" in axes else values
    like = {"index": jax.ShapeDtypeStruct(expected.shape, jnp.int32)}
    if not fits:
        with refused(ValueError, "path", "h.0.index", "has values that int32 cannot hold"):
            peft.load_base(tmp_path, like, names)
        return
    found = peft.load_base(tmp_path, like, names)["index"]
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)


# ------------------------------------------------------------------------------- files that lie

ONE = {"up": {"kernel": jax.ShapeDtypeStruct((COLUMNS, ROWS), jnp.float32)}}
ONE |= {"norm": {"scale": jax.ShapeDtypeStruct((ROWS,), jnp.float32)}}
STATE = "up.weight.quant_state.bitsandbytes__nf4"


def state(**fields):
    """The state of the kernel with other fields; None takes one away."""

    def change(x):
        found = json.loads(x.tobytes()) | fields
        found = {k: v for k, v in found.items() if v is not None}
        return np.frombuffer(json.dumps(found).encode(), np.uint8)

    return change


def nan(x):
    return np.full_like(x, np.nan)


# A format, its tensor, what becomes of it (None: it is taken away), and what is said.
LIES = [  # a format, a tensor, what becomes of it; the place of the problem, and what was got
    ("nf4", STATE, None, "up.weight", "has 4-bit codes"),
    ("nf4", STATE, state(quant_type="nf5"), STATE, "`quant_type` 'nf5'"),
    ("nf4", STATE, state(shape=[COLUMNS, 8, 8]), "up.weight", "got (128, 8, 8)"),
    ("nf4", STATE, state(shape=[256, 4, 8]), "up.weight", "blocks of 64 cross experts"),
    ("nf4", STATE, state(blocksize=63), STATE, "`blocksize` 63"),
    ("nf4", STATE, state(blocksize=True), STATE, "`blocksize` True"),
    ("nf4", STATE, state(blocksize=10**30), STATE, "`blocksize` 1000000000"),
    ("nf4", STATE, state(shape=[ROWS]), STATE, "`shape` [64]"),
    ("nf4", STATE, state(shape=[COLUMNS, ROWS]), "up.weight", "got (128, 64)"),
    ("nf4", STATE, state(dtype="int8"), STATE, "`dtype` 'int8'"),
    ("nf4", STATE, state(dtype=None), STATE, "`dtype` None"),
    ("nf4", STATE, state(nested_offset="x"), STATE, "`nested_offset` 'x'"),
    ("nf4", STATE, state(nested_dtype="float16"), STATE, "`nested_dtype` 'float16'"),
    ("nf4", STATE, lambda x: x[:-1], STATE, "is not valid JSON"),
    ("nf4", STATE, lambda x: np.full(20_000, 32, np.uint8), STATE, "got 20000"),
    ("nf4", "up.weight.absmax", None, "up.weight.absmax", "missing"),
    ("bitsandbytes, 8 bits", "up.SCB", None, "up.SCB", "missing"),
    ("nf4", "up.weight.absmax", lambda x: x[:-1], "up.weight.absmax", "got U8 (127,)"),
    ("nf4", "up.weight.absmax", np.float32, "up.weight.absmax", "got F32 (128,)"),
    ("nf4", "up.weight.nested_absmax", nan, "up.weight.nested_absmax", "not finite"),
    ("nf4", "up.weight.quant_map", lambda x: x[::-1], "up.weight.quant_map", "is not the table"),
    ("nf4", "up.weight.nested_quant_map", nan, "up.weight.nested_quant_map", "not finite"),
    ("nf4", "up.weight", lambda x: x[:-1], "up.weight", "got 4095"),
    ("nf4", "norm.weight", None, "norm.weight", "missing"),
    ("nf4", "norm.weight", lambda x: x[:-1], "norm.weight", "got "),
    ("nf4", "norm.weight", nan, "norm.weight", "not finite"),
    ("nf4", "more", lambda _: np.ones(2), "more", "unexpected"),
    ("fp8", "up.weight", nan, "up.weight", "NaN"),
    ("fp8", "up.weight_scale_inv", lambda x: x + np.float32(3e38), "up.weight", "up to 1.34e+41"),
    # With this a code is multiplied before it is divided.
    ("bitsandbytes, 8 bits", "up.SCB", lambda x: x + np.float32(6e36), "up.weight", "up to inf"),
    ("gptq", "up.g_idx", lambda x: x + 1, "up", "in groups other than the 4"),
    ("gptq", "up.g_idx", lambda x: x[:-1], "up.g_idx", "got I32 (127,)"),
    ("gptq, by activation", "up.g_idx", None, "up.g_idx", "missing"),
    ("compressed-tensors, by activation", "up.weight_g_idx", lambda x: x + 1, "up", "in groups"),
    ("compressed-tensors", "up.weight_scale", lambda x: x[:, :3], "up", "3 groups of scales"),
    ("compressed-tensors", "up.weight_shape", lambda x: x + 8, "up.weight_packed", "got (64, 16)"),
]


@pytest.mark.parametrize(
    ("format", "name", "change", "where", "got"),
    LIES,
    ids=[f"{format}: {name}: {got}" for format, name, _, _, got in LIES],
)
def test_lies(format, name, change, where, got, tmp_path):
    files = {"up": (FORMATS | DENSE)[format]()}
    folder, tensors = write(tmp_path / "base", files), tensors_of(files)
    old = tensors.pop(name, None)
    if change is not None:
        tensors[name] = np.array(change(old), order="C")
    save_file(tensors, folder / "model.safetensors")
    with refused(ValueError, "path", where, got) as e:
        peft.load_base(folder, ONE, NAMES)
    assert len(e.value.problems) == 1


def groups_of(field, *values):
    """A configuration of compressed-tensors with a group of modules for each of the values."""
    return {"config_groups": {f"group_{x}": {"weights": {field: x}} for x in values}}


sizes_of, bits_of = partial(groups_of, "group_size"), partial(groups_of, "num_bits")
CONFIGURATIONS = [  # what is in a configuration, and what is said of it
    ("gptq", {"bits": 3}, "`bits` of the quantization", "got 3"),
    ("gptq", {"bits": True}, "`bits` of the quantization", "got True"),
    ("gptq", {"bits": 8}, "up.qzeros", "got I32 (4, 8)"),
    ("gptq", {"checkpoint_format": "marlin"}, "got 'marlin'"),
    ("gptq", {"quant_method": "hqq"}, "unknown `quant_method` 'hqq'"),
    ("gptq", {"quant_method": 3}, "unknown `quant_method` 3"),
    ("awq", {"version": "gemv"}, "`version` of the quantization", "got 'gemv'"),
    ("awq", {"group_size": 96}, "up", "2 groups of scales for 128 inputs contradict `group_size`"),
    ("awq", {"group_size": 256}, "up", "2 groups of scales for 128 inputs contradict"),
    ("fp8", {"weight_block_size": [48, 48]}, "blocks of 48 × 48; got shape (2, 4)"),
    ("fp8", {"weight_block_size": [0, 48]}, "got [0, 48]"),
    ("int8 by output", sizes_of(64), "up", "1 groups of scales for 128 inputs contradict"),
    *(
        ("compressed-tensors", config, *facts)
        for config, *facts in (
            ({"format": "nvfp4-pack-quantized"}, "`format` of the quantization", "got 'nvfp4-pack"),
            ({"format": "marlin-24"}, "`format` of the quantization", "got 'marlin-24'"),
            ({"config_groups": {"group_0": {"format": "mxfp8-quantized"}}}, "got 'mxfp8"),
            ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparse-24-bitmask' is not"),
            ({"transform_config": {"config_groups": {}}}, "rotated weights are not supported"),
            (sizes_of(48, 64), "up", "4 groups of scales for 128 inputs contradict"),
            (
                groups_of("block_structure", (1, 48)),
                "up",
                "4 groups of scales for 128 inputs contradict",
            ),
            (bits_of(8), "its shape (64, 16) is that of 4 bits, and `num_bits`"),
        )
    ),
]


@pytest.mark.parametrize("case", CONFIGURATIONS, ids=lambda x: f"{x[0]} {x[1]}"[:60])
def test_configurations(case, tmp_path):
    format, config, *facts = case
    folder = write(tmp_path / "base", {"up": FORMATS[format]()}, **config)
    with refused(ValueError, "path", *facts):
        peft.load_base(folder, ONE, NAMES)


@pytest.mark.parametrize(
    ("format", "config"),
    [
        ("awq", {"group_size": None}),
        ("gptq, all inputs", {"group_size": -1}),
        ("gptq, all inputs", {"group_size": 256}),
        ("compressed-tensors", sizes_of(64, 32)),
        ("compressed-tensors", sizes_of(None)),
        ("int8 by output", sizes_of(64, -1)),
        ("int8 by tensor", sizes_of(None, 64)),
    ],
)
def test_groups_that_the_configuration_has(format, config, tmp_path):
    """Where the groups are next to each other, their order may be missing."""
    file = FORMATS[format]()
    file.pop("g_idx", None)
    loaded = peft.load_base(write(tmp_path / "base", {"up": file}, **config), ONE, NAMES)
    assert_rounded(jlora.dequantize(loaded)["up"]["kernel"], file.matrix.T)


@pytest.mark.parametrize("bits", [(4,), (8,), (8, 4), ()])
def test_a_few_inputs_of_compressed_tensors(bits, tmp_path):
    """They take one word a row in 4 and in 8 bits, so that the configuration has to say which."""
    codes, scale = draw(ROWS, 4), scales(ROWS, 1)
    parts = {
        "weight_packed": words(np.pad(codes, ((0, 0), (0, 4)))),
        "weight_scale": scale,
        "weight_shape": np.array(codes.shape, np.int64),
    }
    if bits == (8,):
        parts["weight_packed"] = words(codes, bits=8)
    file = File(compressed().config, None, **parts)
    folder = write(tmp_path / "base", {"up": file}, **bits_of(*bits))
    like = ONE | {"up": {"kernel": jnp.zeros(codes.shape[::-1])}}
    if len(bits) == 1:
        [middle] = [2 ** (n - 1) for n in bits]
        loaded = jlora.dequantize(peft.load_base(folder, like, NAMES))
        expected = (codes.astype(np.float32) - middle) * scale.astype(np.float32)
        return assert_rounded(loaded["up"]["kernel"], expected.T)
    said = ", ".join(map(str, bits)) or "None"
    with refused(ValueError, "path", "is that of 4 or 8 bits, and `num_bits`", f"is {said}"):
        peft.load_base(folder, like, NAMES)


def test_what_is_wrong_of_every_layer_is_said_once(tmp_path):
    folder = write(tmp_path / "base", {f"h.{i}.up": gptq() for i in range(3)}, bits=3)
    names = [peft.Name(r"h(\d)", r"h.\1.up", "io"), *NAMES]
    tree = {f"h{i}": jax.ShapeDtypeStruct((COLUMNS, ROWS), jnp.float32) for i in range(3)}
    with refused(ValueError, "path", "`bits` of the quantization", "got 3") as e:
        peft.load_base(folder, tree | {"norm": ONE["norm"]}, names)
    assert len(e.value.problems) == 1


def test_codes_and_floats_of_one_name(tmp_path):
    tensors = tensors_of({"up": gptq()}) | {"up.weight": np.ones((ROWS, COLUMNS), np.float32)}
    folder = write(tmp_path / "base", {"up": gptq()})
    save_file(tensors, folder / "model.safetensors")
    with refused(ValueError, "path", "up.weight", "is there in codes and in floats"):
        peft.dequantize_checkpoint(folder, tmp_path / "dense")
    with refused(ValueError, "path", "up.weight", "unexpected"):
        peft.load_base(folder, ONE, NAMES)


def mutants(seed, tensors):
    """The tensors after a random change to one of them."""
    rng = np.random.default_rng(seed)
    name = sorted(tensors)[rng.integers(len(tensors))]
    x = tensors[name]
    kind = rng.integers(6)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name] = x.reshape(-1)[: rng.integers(x.size + 1)].copy()
    elif kind == 2:
        tensors[name] = np.frombuffer(rng.bytes(x.nbytes), x.dtype).reshape(x.shape)
    elif kind == 3:
        to = [np.float32, np.int8, np.uint8, np.int32, np.float16][rng.integers(5)]
        with np.errstate(all="ignore"):
            tensors[name] = x.astype(to)
    elif kind == 4:
        flat = bytearray(x.tobytes())
        if flat:
            flat[rng.integers(len(flat))] ^= 1 << rng.integers(8)
        tensors[name] = np.frombuffer(bytes(flat), x.dtype).reshape(x.shape)
    else:
        tensors[f"{name}.{'absmax' if rng.integers(2) else 'x'}"] = x


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_lies(count, tmp_path):
    """Refused in our words, or read as finite values; never anything else."""

    def lie(draw, folder):
        make = draw.choice([make for format, make in FORMATS.items() if format != "mxfp4"])
        files = {f"h.{i}.up": make(seed=i) for i in range(2)}
        tensors = tensors_of(files)
        mutants(draw.randrange(2**32), tensors)
        save_file(tensors, write(folder / "base", files) / "model.safetensors")
        return folder / "base"

    def answer(folder, out):
        with contextlib.suppress(ValueError):  # and without names, whose `find` reads it first
            peft.dequantize_checkpoint(folder, out)
            shutil.rmtree(out)
        for x in jax.tree.leaves(jlora.dequantize(peft.load_base(folder, like(), NAMES))):
            assert np.isfinite(np.asarray(x)).all()

    campaign(count, tmp_path, lie, answer, "`path`: ")


# ---------------------------------------------------------------------------------------- GGUF

TYPES = gguf.GGMLQuantizationType


def write_gguf(folder, data, type_=None):
    """A file with one matrix."""
    writer = gguf.GGUFWriter(path := folder / "a.gguf", "llama")
    writer.add_tensor("up.weight", data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q5_0", "Q4_K", "Q6_K", "F16", "MXFP4"])
def test_gguf(kind, tmp_path):
    shape = (ROWS, 512)
    type_ = TYPES[kind]
    if kind == "F16":
        data = scales(*shape)
    elif kind in ("Q4_K", "Q6_K", "MXFP4"):  # which gguf cannot quantize to
        block, size = gguf.GGML_QUANT_SIZES[type_]
        data = draw(ROWS, 512 // block, size, high=30)
        data[..., 0] += 100 if kind == "MXFP4" else 0  # XLA has no subnormal numbers
        data = data.reshape(ROWS, -1)
    else:
        data = gguf.quantize(scales(*shape, dtype=np.float32) - 0.07, type_)
    path = write_gguf(tmp_path, data, type_)
    tree = {"up": {"kernel": jax.ShapeDtypeStruct(shape[::-1], jnp.float32)}}
    leaf = peft.load_base(path, tree, NAMES)["up"]["kernel"]
    packed = kind in ("Q4_0", "Q4_1", "Q8_0", "MXFP4")
    assert isinstance(leaf, jlora.Quantized) == packed
    expected = np.float32(data) if kind == "F16" else gguf.dequantize(data, type_)
    value = jax.jit(jlora.Quantized.array)(leaf) if packed else leaf
    assert_rounded(value, expected.T)


@pytest.mark.parametrize("kind", ["safetensors", "GGUF", "tensors"])
def test_64_bits_are_not_narrowed(kind, tmp_path):
    tree = {"up": {"kernel": jax.ShapeDtypeStruct((32, ROWS), jnp.float32)}}
    w = np.random.default_rng(0).standard_normal((ROWS, 32))
    save_file({"up.weight": w}, tmp_path / "model.safetensors")

    def load():
        if kind == "tensors":
            return peft.from_tensors({"up.weight": w}, tree, NAMES)
        path = tmp_path if kind == "safetensors" else write_gguf(tmp_path, w)
        return peft.load_base(path, tree, NAMES)

    with refused(ValueError, "", "up.weight", "its dtype float64 needs jax_enable_x64"):
        load()
    with jax.enable_x64(True):
        leaf = load()["up"]["kernel"]
        assert leaf.dtype == jnp.float64
        np.testing.assert_array_equal(leaf, w.T)


@pytest.mark.parametrize("shape", [(), (0, 32), (4, 0)])
def test_gguf_without_numbers(shape, tmp_path):
    """A tensor in codes that is none, which is one problem of the list."""
    name, axes = b"up.weight", struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    head = struct.pack("<4sIQQQ", b"GGUF", 3, 1, 0, len(name)) + name + axes
    path = tmp_path / "a.gguf"
    path.write_bytes(head + struct.pack("<IQ", TYPES.Q8_0, 0) + bytes(64))
    tree = {"up": {"kernel": jax.ShapeDtypeStruct((32, 4), jnp.float32)}}
    with refused(ValueError, "path", "up.weight", f"got shape {shape}"):
        peft.load_base(path, tree, NAMES)


def test_gguf_that_is_none(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(20))
    with refused(ValueError, "path", "is not a valid GGUF file: "):
        peft.load_base(tmp_path / "a.gguf", like(), NAMES)
    with refused(FileNotFoundError, "path", tmp_path / "b.gguf", "there is no file"):
        peft.load_base(tmp_path / "b.gguf", like(), NAMES)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with refused(ImportError, "path", "pip install 'jlora[gguf]'"):
        peft.load_base(tmp_path / "a.gguf", like(), NAMES)


def test_codes_are_not_written(tmp_path):
    base = jlora.quantize({"up": {"kernel": jnp.ones((COLUMNS, ROWS))}}, jlora.Int4("kernel"))
    with refused(ValueError, "base", "up/kernel", "Save jlora.dequantize(base)"):
        peft.save_base(tmp_path / "base", base, NAMES)
    assert not (tmp_path / "base").exists()


def test_save_base_beside_the_files_of_its_model(tmp_path):
    """What a user needs to load the result is copied; weights and links out are not."""
    source = write(tmp_path / "base", {"up": gptq()})
    base = jlora.dequantize(peft.load_base(source, ONE, NAMES))
    files = {"tokenizer.json": "{}", "generation_config.json": "{}", "code/model.py": "pass"}
    for name, text in files.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    config = json.loads((source / "config.json").read_text()) | {"model_type": "llama"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "pytorch_model.bin").write_text("a pickle")
    peft.save_base(tmp_path / "new", base, NAMES, config=source)
    new = {p.relative_to(tmp_path / "new").as_posix(): p for p in (tmp_path / "new").rglob("*.*")}
    assert new.keys() == {*files, "config.json", "model.safetensors"}
    assert all(new[name].read_text() == text for name, text in files.items())
    assert json.loads(new["config.json"].read_text()) == {"model_type": "llama"}
    again = peft.load_base(tmp_path / "new", base, NAMES)
    jax.tree.map(np.testing.assert_array_equal, again, base)
    (tmp_path / "secret").write_text("of another")
    (source / "tokenizer.model").symlink_to(tmp_path / "secret")
    with refused(ValueError, "config", "tokenizer.model"):
        peft.save_base(tmp_path / "linked", base, NAMES, config=source)
    assert not (tmp_path / "linked").exists()
