"""`peft.find_names`: which tensor each leaf holds, by its values. Never a wrong one."""

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from peft_files import Folder
from safetensors.numpy import save_file

from jlora import peft
from jlora._site import Site
from jlora._sites import Sites
from jlora._tree import leaves_by_path
from jlora.peft import Name
from jlora.peft.names._leaves import find_leaves, row_of
from jlora.peft.names.tables import gemma, keras_hub, maxtext, tunix
from jlora.types import Layout

V, D, H, K, N, F, E, L = 40, 16, 4, 2, 8, 24, 4, 3  # vocabulary, width, heads, …, experts, layers
Shapes = dict[str, tuple[int, ...]]
KINDS = {"linear": "dense", "experts": "dense", "embedding": "embed", "conv": "conv", None: None}


def draw(shapes: Shapes, seed: int = 0, dtype: Any = np.float32) -> Any:
    rng = np.random.default_rng(seed)
    return unflatten_dict({k: rng.standard_normal(s).astype(dtype) for k, s in shapes.items()}, "/")


def sites_of(params: Any, names: Sequence[Name]) -> Sites:
    """The sites of a model that uses its leaves as a table says."""

    def site(path: tuple[str, ...], x: Any) -> Site:
        row, _ = row_of(path, x.shape, names) or (Name("", "m", "o"), None)
        # MaxText's gate and up of gpt-oss are for all experts, so that these are outputs.
        stack = [d for d in row.where("le") if row.axes[d] == "l" or not row.alternating]
        outputs = [d for d in range(x.ndim) if d not in stack and row.axes[d] in "oes"]
        layout = Layout(tuple(stack), row.where("ivk"), tuple(outputs))
        return Site(path, x.shape, jnp.dtype(x.dtype), KINDS[row.kind], layout)

    return Sites(tuple(site(path, x) for path, x in leaves_by_path(params)))


def what(params: Any, names: Sequence[Name]) -> dict[Any, Any]:
    """Of each leaf, all that a table says of it."""
    return {
        leaf.path: (
            leaf.parameters,
            leaf.name.layout,
            leaf.name.weight_groups,
            leaf.name.part,
            leaf.name.interleaved,
            leaf.name.is_swapped,
            round(leaf.factor, 5),
        )
        for leaf in find_leaves(params, names)
    }


def layers(count: int, shapes: Shapes, at: str = "layers/{}/") -> Shapes:
    return {at.format(i) + key: x for i in range(count) for key, x in shapes.items()}


def stacked(shapes: Shapes, count: int, at: str) -> Shapes:
    """Scanned layers, on axis 1."""
    return {at + key: (x[0], count, *x[1:]) for key, x in shapes.items()}


ATTENTION = {"q": (D, H, N), "k": (D, K, N), "v": (D, K, N), "o": (H, N, D)}
TUNIX = {
    **{f"attn/{key}_proj/w": x for key, x in ATTENTION.items()},
    "attn/q_bias": (H * N,),
    "input_layernorm/w": (D,),
    "post_attention_layernorm/w": (D,),
}
MLP = {"gate": (D, F), "up": (D, F), "down": (F, D)}
ENDS = {"embedder/input_embedding": (V, D), "final_norm/w": (D,), "lm_head/w": (D, V)}
EXPERTS = {f"mlp/{key}_proj": (E, *x) for key, x in MLP.items()} | {"mlp/router/kernel": (D, E)}
GEMMA = {
    "attn/q_einsum/w": (H, D, N),
    "attn/kv_einsum/w": (2, K, D, N),
    "attn/attn_vec_einsum/w": (H, N, D),
    "mlp/gating_einsum": (2, F, D),
    "mlp/linear": (F, D),
    "pre_attention_norm/scale": (D,),
}
KERAS = {
    **{f"self_attention/{k}/kernel": ATTENTION[k[0]] for k in ("query", "key", "value")},
    "self_attention/attention_output/kernel": (H, N, D),
    "feedforward_gate_dense/kernel": (D, F),
    "feedforward_output_dense/kernel": (F, D),
    "self_attention_layernorm/scale": (D,),
}
MAX = {f"self_attention/{k}/kernel": ATTENTION[k[0]] for k in ("query", "key", "value", "out")}
MAX_MLP = {"mlp/wi_0/kernel": (D, F), "mlp/wi_1/kernel": (D, F), "mlp/wo/kernel": (F, D)}
MAX_NORMS = {f"{x}_self_attention_layer_norm/scale": (D,) for x in ("pre", "post")}
MAX_ENDS = {"token_embedder/embedding": (V, D), "decoder/decoder_norm/scale": (D,)}
MOE = "DeepSeekMoeBlock_0/MoeBlock_0"
DEEP = {
    "self_attention/wq_a/kernel": (D, 6),
    "self_attention/wq_b/kernel": (6, H, N),
    "self_attention/kv_norm/scale": (10,),
    f"{MOE}/gate/kernel": (D, E),
    f"{MOE}/gate/bias": (E,),
}
OSS = {
    **{k.replace("self_attention", "GptOssAttention"): x for k, x in MAX.items()},
    "GptOssAttention/query/bias": (H, N),
    "GptOssAttention/sinks": (H,),
}


def max_experts(at: str, count: int, biases: bool = False) -> Shapes:
    """Stacked experts: gate, up and down, (experts, layers, inputs, outputs)."""
    own = {"wi_0": (E, count, D, F), "wi_1": (E, count, D, F), "wo": (E, count, F, D)}
    more = {f"{key}_bias": (*x[:2], x[3]) for key, x in own.items()} if biases else {}
    return {at + key: x for key, x in (own | more).items()}


BLOCK = "decoder/layers/layers_{}/"
TABLES: dict[str, tuple[Sequence[Name], Shapes]] = {
    "tunix": (
        tunix.LLAMA3,
        ENDS | layers(L, TUNIX | {f"mlp/{k}_proj/kernel": x for k, x in MLP.items()}),
    ),
    "tunix, experts one by one": (tunix.QWEN3, ENDS | layers(L, TUNIX | EXPERTS)),
    "tunix, experts": (tunix.QWEN3_EXPERTS, ENDS | layers(L, TUNIX | EXPERTS)),
    "gemma": (
        gemma.GEMMA3,
        {"embedder/input_embedding": (V, D)} | layers(L, GEMMA, "layer_{}/"),
    ),
    "keras-hub": (
        keras_hub.LLAMA3,
        {"token_embedding/embeddings": (V, D)} | layers(L, KERAS, "transformer_layer_{}/"),
    ),
    "maxtext": (
        maxtext.LLAMA,
        MAX_ENDS | stacked(MAX | MAX_MLP | MAX_NORMS, L, "decoder/layers/"),
    ),
    "maxtext, not scanned": (
        maxtext.LLAMA,
        MAX_ENDS | layers(L, MAX | MAX_MLP | MAX_NORMS, "decoder/layers_{}/"),
    ),
    "deepseek": (
        maxtext.deepseek(2),
        MAX_ENDS
        | stacked(MAX_MLP | MAX_NORMS, 2, "decoder/dense_layers/")
        | stacked(DEEP | MAX_NORMS, L, "decoder/moe_layers/")
        | max_experts(f"decoder/moe_layers/{MOE}/", L),
    ),
    "gpt-oss": (
        maxtext.GPT_OSS,
        MAX_ENDS
        | {k: x for i in range(2) for k, x in stacked(OSS, L, BLOCK.format(i)).items()}
        | {
            k: x
            for i in range(2)
            for k, x in max_experts(BLOCK.format(i) + "GptOssMlp/", L, biases=True).items()
        },
    ),
    "gpt2": (
        peft.TABLES["gpt2"],
        {"transformer/wte/embedding": (V, D)}
        | layers(
            L,
            {"attn/c_attn/kernel": (3 * D, D), "attn/c_attn/bias": (3 * D,), "ln_1/scale": (D,)},
            "transformer/h/{}/",
        ),
    ),
    "scanned": (
        peft.TABLES["llama-scanned"],
        {"model/embed_tokens/embedding": (V, D)}
        | {f"model/layers/mlp/{k}_proj/kernel": (L, *x) for k, x in MLP.items()}
        | {"model/layers/input_layernorm/scale": (L, D)},
    ),
}


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("table", TABLES)
def test_each_table_is_found(table: str, dtype: Any, tmp_path: Folder) -> None:
    """By the values of a checkpoint in float32: row by row what was typed."""
    names, shapes = TABLES[table]
    params = draw(shapes)
    model = {"model_type": table.replace("-", "_")}
    peft.save_base(tmp_path / "base", params, names, config=model)
    rounded = jax.tree.map(lambda x: x.astype(dtype), params)
    found = peft.find_names(tmp_path / "base", rounded, sites_of(params, names))
    assert found.left == ()
    assert what(params, found) == what(params, names)
    assert eval(str(found), {"Name": Name}) is not None  # what it prints is code
    assert copy.copy(found) == found and copy.copy(found).left == found.left


# -------------------------------------------------- layouts of others, written here by hand

Change = Callable[[np.ndarray], np.ndarray]
IO, OI, VO, NORM = Layout((), (0,), (1,)), Layout((), (1,), (0,)), Layout((), (0,), (1,)), None
EIO = Layout((0,), (1,), (2,))
HEADS, OUT = Layout((), (0,), (1, 2)), Layout((), (0, 1), (2,))
CONV = Layout((), (0, 1, 2), (3,))


class Row(NamedTuple):
    """A leaf of a port: its path, its tensor, and what the port does with it."""

    path: str
    tensor: str
    shape: tuple[int, ...]
    change: Change
    layout: Layout | None
    kind: str = "dense"


def turn(x: np.ndarray) -> np.ndarray:
    return x.T


def keep(x: np.ndarray) -> np.ndarray:
    return x


def split(*shape: int, times: float = 1.0) -> Change:
    """(outputs, inputs) as (inputs, outputs), with its axes split, and divided."""
    return lambda x: (x.T.reshape(shape) * times).astype(x.dtype)


def module(path: str) -> str:
    """The weight of a module that is called as in the port."""
    return path.replace("/", ".").rpartition(".")[0] + ".weight"


def turned(path: str, *shape: int, tensor: str = "") -> Row:
    """A matrix, (outputs, inputs) in PyTorch."""
    return Row(path, tensor or module(path), shape, turn, IO)


def kept(path: str, *shape: int, tensor: str = "", layout: Layout | None = NORM) -> Row:
    """Experts, a norm or a bias, as they are."""
    return Row(path, tensor or module(path), shape, keep, layout)


def each_layer(at: str, theirs: str, rows: Sequence[Row]) -> list[Row]:
    return [
        row._replace(path=at.format(i) + row.path, tensor=theirs.format(i) + row.tensor)
        for i in range(L)
        for row in rows
    ]


SIDES = {"q": H * N, "k": K * N, "v": K * N}
MLPS = {"gate": (F, D), "up": (F, D), "down": (D, F)}
HEADED = {"q": (D, H, N), "k": (D, K, N), "v": (D, K, N)}
# bonsai's Llama 3.2, Gemma-like names and DINOv3, and the Llamas 3 and 4 of jax-llm-examples.
OF_EXPERTS = "feed_forward.experts"
LAYER = "layers/{}/", "model.layers.{}."
PORTS: dict[str, list[Row]] = {
    "bonsai llama32": [
        Row("embedder/embedding", "model.embed_tokens.weight", (V, D), keep, VO, "embed"),
        turned("lm_head/kernel", V, D, tensor="model.embed_tokens.weight"),
        kept("final_norm/scale", D, tensor="model.norm.weight"),
        *each_layer(
            *LAYER,
            [
                *(turned(f"self_attn/{k}_proj/kernel", n, D) for k, n in SIDES.items()),
                *(turned(f"mlp/{k}_proj/kernel", *x) for k, x in MLPS.items()),
                kept("input_layernorm/scale", D),
            ],
        ),
    ],
    "bonsai gpt_oss": each_layer(
        "model/layers/{}/",
        "model.layers.{}.",
        [
            turned("self_attn/q_proj/kernel", H * N, D),
            kept("self_attn/q_proj/bias", H * N, tensor="self_attn.q_proj.bias"),
            turned("mlp/router/linear/kernel", E, D, tensor="mlp.router.weight"),
            *(
                kept(f"mlp/experts/{k}", E, *x, tensor=f"mlp.experts.{k}", layout=EIO)
                for k, x in {"gate_up_proj": (D, 2 * F), "down_proj": (F, D)}.items()
            ),
        ],
    ),
    "bonsai dinov3": [
        Row(
            *("embeddings/patch_embeddings/kernel", "embeddings.patch_embeddings.weight"),
            *((D, 3, 4, 4), lambda x: x.transpose(2, 3, 1, 0), CONV, "conv"),
        ),
        *each_layer(
            "layer/{}/",
            "layer.{}.",
            [
                *(turned(f"attention/{k}_proj/kernel", D, D) for k in "qk"),
                kept("norm1/scale", D),
                kept("norm1/bias", D, tensor="norm1.bias"),
                kept("layer_scale1/lambda1", D, tensor="layer_scale1.lambda1"),
            ],
        ),
    ],
    "jax-llm-examples llama3": [
        Row("embedding", "model.embed_tokens.weight", (V, D), keep, VO, "embed"),
        turned("lm_head", V, D, tensor="lm_head.weight"),
        *each_layer(
            *LAYER,
            [
                *(
                    Row(f"attn/{k}", f"self_attn.{k}_proj.weight", (SIDES[k], D), split(*x), HEADS)
                    for k, x in HEADED.items()
                ),
                Row("attn/o", "self_attn.o_proj.weight", (D, H * N), split(H, N, D), OUT),
                turned("mlp/w_gate", F, D, tensor="mlp.gate_proj.weight"),
                kept("attn_pre_gamma", D, tensor="input_layernorm.weight"),
                # As in ports that scale queries once and for all.
                Row("q", "q.weight", (H * N, D), split(D, H, N, times=N**-0.5), HEADS),
            ],
        ),
    ],
    "jax-llm-examples llama4": each_layer(
        "layers/{}/",
        "language_model.model.layers.{}.",
        [
            turned("mlp/w_router", E, D, tensor="feed_forward.router.weight"),
            *(
                Row(f"mlp/we_{k}", f"{OF_EXPERTS}.gate_up_proj", (E, D, 2 * F), change, EIO)
                for k, change in {"gate": lambda x: x[..., :F], "up": lambda x: x[..., F:]}.items()
            ),
            kept("mlp/we_down", E, F, D, tensor=f"{OF_EXPERTS}.down_proj", layout=EIO),
        ],
    ),
}


def made(rows: Sequence[Row], folder: Folder, tensors: Mapping[str, Any]) -> tuple[Any, Sites]:
    """What a port makes of a checkpoint, and how it uses it."""
    folder.mkdir()
    save_file(
        {k: np.ascontiguousarray(x) for k, x in tensors.items()}, folder / "model.safetensors"
    )
    flat = {row.path: np.ascontiguousarray(row.change(tensors[row.tensor])) for row in rows}
    params, uses = unflatten_dict(flat, "/"), {row.path: row for row in rows}

    def site(path: tuple[str, ...], x: Any) -> Site:
        row = uses["/".join(path)]
        kind = row.kind if row.layout else None
        return Site(path, x.shape, jnp.dtype(x.dtype), kind, row.layout or Layout((), (), ()))

    return params, Sites(tuple(site(path, x) for path, x in leaves_by_path(params)))


def tensors_of(rows: Sequence[Row], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {row.tensor: rng.standard_normal(row.shape).astype(np.float32) for row in rows}


def check(found: Any, params: Any, rows: Sequence[Row], left: Sequence[str] = ()) -> None:
    """Each leaf has its tensor's name, or is left; and the tensors come out again."""
    assert [problem.where for problem in found.left] == list(left)
    expected = {row.path: {row.tensor} for row in rows if row.path not in left}
    named = {"/".join(leaf.path): {*leaf.parameters} for leaf in find_leaves(params, found)}
    assert named == expected


@pytest.mark.parametrize("port", PORTS)
def test_ports_of_others(port: str, tmp_path: Folder) -> None:
    rows = PORTS[port]
    tensors = tensors_of(rows)
    params, sites = made(rows, tmp_path / "base", tensors)
    found = peft.find_names(tmp_path / "base", params, sites)
    check(found, params, rows, ["lm_head/kernel"] if "llama32" in port else [])
    if port.startswith("bonsai llama32"):
        del params["lm_head"]
    again = peft.to_tensors(params, found)
    for name, x in again.items():
        np.testing.assert_allclose(x, tensors[name], rtol=1e-6)


@pytest.mark.parametrize("start", [0, 2])
def test_numbers_with_zeros(start: int, tmp_path: Folder) -> None:
    """PyTorch has none before its numbers; `start` numbers its layers otherwise."""
    rows = [
        turned(f"layer_{i:02d}/{name}/w", 6, 5, tensor=f"h.{i + start}.{name}.weight")
        for i in range(11)
        for name in "ab"
    ]
    # Rows list the numbers where the layers of one name have different forms.
    last = [f"b.{i}.{'cd'[i // 6]}.weight" for i in range(11)]
    rows += [turned(f"block_{i:02d}/w", 6, 5, tensor=x) for i, x in enumerate(last)]
    params, sites = made(rows, tmp_path / "base", tensors_of(rows))
    check(peft.find_names(tmp_path / "base", params, sites), params, rows)


# ------------------------------------------------------------------------- a thousand at random


def shuffled(draw: random.Random) -> list[Row]:
    """Rows of a random port."""
    rows = list[Row]()
    width, heads, n = draw.choice([8, 12, 16]), draw.choice([2, 3]), draw.choice([4, 6])
    name = draw.choice(["h", "layers", "blocks_1"])
    start = draw.choice([0, 0, 3])
    kinds: dict[str, tuple[tuple[int, ...], Change, Layout | None, str]] = {
        "a": ((heads * n, width), turn, IO, "dense"),
        "b": ((heads * n, width), keep, OI, "dense"),
        "c": ((heads * n, width), split(width, heads, n), HEADS, "dense"),
        "d": ((width, heads * n), split(heads, n, width), OUT, "dense"),
        "e": ((width, width), turn, IO, "dense"),
        "f": ((width, width), keep, OI, "dense"),
        "g": ((4, width, 2 * n), lambda x: x.transpose(0, 2, 1), EIO, "dense"),
        "h": ((width,), keep, NORM, "dense"),
        "k": ((width, width), split(width, width, times=0.25), IO, "dense"),
    }
    chosen = draw.sample(sorted(kinds), draw.randint(2, 6))
    for i in range(draw.randint(1, 4)):
        for kind in chosen:
            shape, change, layout, use = kinds[kind]
            tensor = f"model.layers.{i + start}.{kind}x.weight"
            rows.append(Row(f"{name}/{i}/{kind}/w", tensor, shape, change, layout, use))
    return rows


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_shuffled(count: int, tmp_path: Folder) -> None:
    """Some tensors equal others, or are constant, and one leaf is in none: never a wrong name."""
    named = left = 0
    for seed in range(count):
        draw = random.Random(seed)
        rows = shuffled(draw)
        tensors = tensors_of(rows, seed)
        names = sorted(tensors)
        for name in draw.sample(names, draw.randint(0, min(3, len(names)))):
            same = [x for x in names if tensors[x].shape == tensors[name].shape]
            value = draw.choice([tensors[draw.choice(same)], np.ones_like(tensors[name])])
            tensors[name] = value
        params, sites = made(rows, tmp_path / str(seed), tensors)
        gone = draw.choice(rows).path
        flat: dict[str, Any] = dict(flatten_dict(params, sep="/"))
        params = unflatten_dict({k: x + 1 if k == gone else x for k, x in flat.items()}, "/")
        found = peft.find_names(tmp_path / str(seed), params, sites)
        expected = {row.path: [row.tensor] for row in rows}
        for leaf in find_leaves(params, found) if found else []:
            assert leaf.parameters == expected["/".join(leaf.path)], seed
            named += 1
        assert gone in [problem.where for problem in found.left], seed
        left += len(found.left)
    assert named > 3 * left


# -------------------------------------------------------------------------------------- refused


def test_refused(tmp_path: Folder) -> None:
    params = {"w": np.ones((3, 4), np.float32)}
    sites = sites_of(params, [Name("w", "w", "io")])
    with pytest.raises(ValueError, match="`params` must be the arrays that `sites` lists"):
        folder = tmp_path / "base"
        peft.save_base(folder, params, [Name("w", "w", "io")])
        peft.find_names(folder, {"v": params["w"]}, sites)
    with pytest.raises(FileNotFoundError, match="`path`: there is no folder"):
        peft.find_names(tmp_path / "nowhere", params, sites)
    with pytest.raises(ValueError, match=r"`path`: .* is quantized; give the checkpoint in floats"):
        (tmp_path / "codes").mkdir()
        save_file({"w": np.ones((3, 4), np.int8)}, tmp_path / "codes" / "model.safetensors")
        peft.find_names(tmp_path / "codes", params, sites)
