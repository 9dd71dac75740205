"""What has no form in PEFT's files, and files that are damaged: refused as a whole, by name."""

import functools
import json
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft_models as models
import pytest
from peft_files import (
    CONFIG,
    ENDS,
    PREFIX,
    TENSORS,
    Damage,
    Files,
    Folder,
    all_of,
    bounded,
    change,
    copy,
    drop,
    node,
    pair,
    put,
    say,
)
from test_peft_merged import fixture
from test_peft_methods import NAMES, STACK
from test_peft_modules import PARTS

from jlora import peft
from jlora.peft import Name
from jlora.types import Decomposed, Layout, Replaced

# ---------------------------------------------------------------------------- what is not written

W = Name("w", "m", "io")
BASE, LOW = {"w": np.zeros((4, 6), np.float32)}, {"w": node(W, (4, 6))}
STACKED = {"w": np.ones((3, 8, 6), np.float32)}
DORA = node(STACK, (3, 8, 6), cls=Decomposed)
SLOTS, NORMS = Layout((0,), (1,), (2,), (3, (2, 0), 2)), Layout((), (0, 1), (2,))
TABLE = {"t": np.ones((7, 4), np.float32)}
ROWS = Replaced(np.ones((3, 4), np.float32), (6, 1, 3), Layout((), (0,), (1,)))
VLLM = {"profile": "vllm"}
FLOATS = (
    "`base` must hold floating-point arrays where PEFT stores frozen values with the adapter: "
    "F64, F32, F16, BF16; got {} at q/bias. Give such arrays, adapt other leaves, or export the "
    "merged model."
)


def of_kind(axes: str, *shape: int, **options: Any) -> Any:
    """Base, adapter and table of one leaf of some kind."""
    name = Name("w", "m", axes, **options)
    return {"w": np.zeros(shape, np.float32)}, {"w": node(name, shape)}, [name]


def with_bias(dtype: Any) -> Any:
    """A module that is trained in full, but for a bias."""
    kernel = {"q": {"kernel": np.ones((4, 3), np.float32)}}
    return {"q": kernel["q"] | {"bias": np.ones(3).astype(dtype)}}, kernel, NAMES


# Base, adapter and table; the options of `save`; and what is said.
NOT_WRITTEN: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no names": (
        (BASE, LOW, []), {},
        "`names` must be a table of jlora.peft.Name rows, such as jlora.peft.LLAMA; got [].",
    ),
    "unnamed": (
        (BASE, LOW, [Name("v", "m", "io")]), {}, "w: no row of `names` fits 'w' with 2 axes"
    ),
    "unnamed in a collection": (  # as rows have it, whose paths leave out a leading params/
        ({"params": BASE}, {"params": LOW}, [Name("params/w", "m", "io")]), {},
        "params/w: no row of `names` fits 'w' with 2 axes",
    ),
    "orientation": (
        (BASE, LOW, [Name("w", "m", "oi")]), {},
        "w: expected Layout(stack=(), inputs=(1,), outputs=(0,), slots=None) by `names`, "
        "got Layout(stack=(), inputs=(0,), outputs=(1,), slots=None)",
    ),
    "nan": (
        (BASE, {"w": LOW["w"]._replace(b=np.full((2, 6), np.nan, "f"))}, [W]), {},
        "w: has values that are not finite",
    ),
    "abstract": (
        (BASE, jax.eval_shape(lambda: LOW), [W]), {},
        "w: expected arrays, got jax.ShapeDtypeStruct",
    ),
    "one name twice": (
        (BASE | {"v": BASE["w"]}, LOW, [Name("[wv]", "m", "io")]), {},
        "`names` gives leaves the same name:\n  m.weight: v, w\nNarrow its patterns.",
    ),
    "inseparable": (
        (BASE | {"v": BASE["w"]}, LOW, [W, Name("v", "x.m", "io")]), {},
        "A common reason is that its modules cannot be selected apart from others",
    ),
    "integers beside it": (with_bias(np.int32), {}, FLOATS.format("int32")),
    "eight bits beside it": (with_bias(jnp.float8_e4m3fn), {}, FLOATS.format("float8_e4m3fn")),
    "a part in full": (
        ({x: np.zeros((3, 4, 6), "f") for x in ("gate", "up", "down")},
         {"gate": np.ones((3, 4, 6), "f")}, PARTS), {},
        "gate: is in full, but is only a part of PyTorch's",
    ),
    "dropout rates": (
        (BASE | {"v": BASE["w"]}, LOW | {"v": LOW["w"]._replace(dropout=0.1)},
         [Name("([vw])", r"m.\1", "io")]), {},
        "`adapter` has the dropout rates [0.0, 0.1], but PEFT has one for all sites",
    ),
    "another profile": (
        (BASE, LOW, [W]), {"profile": "tgi"}, "`profile` must be None or 'vllm'; got 'tgi'"
    ),
    "a feature": (
        (BASE, LOW, [W]), {"config": {"use_qalora": True}},
        "`config` cannot be written:\n  use_qalora: True is a feature",
    ),
    # By vLLM.
    "a convolution": (of_kind("kio", 3, 4, 6), VLLM, "m: of kind conv"),
    "experts": (of_kind("eio", 3, 4, 6, parameter="up"), VLLM, "m.up: of kind experts"),
    "a bias": (
        ({"q": {"kernel": np.ones((4, 6), "f"), "bias": np.ones(6, "f")}},
         {"q": {"kernel": LOW["w"], "bias": np.ones(6, "f")}}, NAMES),
        VLLM, "q.bias: trained in full",
    ),
    "DoRA for vLLM": (
        (STACKED, {"w": DORA}, [STACK]), VLLM,
        "`profile` 'vllm' supports only LoRA of linear and embedding sites; got:\n  w.0: DoRA",
    ),
    # Of DoRA.
    "some slots": (
        (STACKED, {"w": node(SLOTS, (3, 8, 6), cls=Decomposed)}, [STACK]), {},
        "  w: has magnitudes for slots (2, 0) only, PEFT for all 3",
    ),
    "some parts": (
        ({x: np.ones((8, 6), "f") for x in "vw"}, {"w": node(W, (8, 6), cls=Decomposed)},
         [Name(x, "m", "io", part=(i, 2)) for i, x in enumerate("vw")]), {},
        "w: is DoRA, but only 1 of the 2 parts of m.weight are",
    ),
    "magnitudes of 0": (
        (STACKED, {"w": DORA._replace(m=0 * DORA.m)}, [STACK]), {},
        "  w: has magnitudes that are all 0",
    ),
    "DoRA of experts": (
        (STACKED, {"w": DORA}, [Name("w", "e", "eio", "e")]), {},
        "  w: is DoRA, but PEFT has only LoRA for parameters of experts",
    ),
    "other norms": (
        (STACKED, {"w": node(NORMS, (3, 8, 6), cls=Decomposed)}, [STACK]), {},
        "  w: has norms over axes (0, 1), PEFT over (1,)",
    ),
    "DoRA at some sites": (
        (STACKED | {"v": BASE["w"]}, {"w": DORA, "v": LOW["w"]}, [STACK, Name("v", "v", "io")]), {},
        "`adapter` has DoRA at some sites and LoRA at others, but PEFT has one method for all "
        "(`use_dora`):\n  LowRank: v\n  Decomposed: w\nMerge it into the model: "
        "jlora.peft.export_merged, or jlora merge.",
    ),
    "DoRA of what is tied": (  # its head is normed over its rows in PEFT, over its columns here
        (TABLE, {"t": node(ROWS.layout, (7, 4), cls=Decomposed)},
         [Name("t", "embed", "vo", tied="head")]), {},
        "`adapter` has DoRA at an embedding that the head shares, but PEFT normalizes the two "
        "separately:\n  t: head\n",
    ),
    # Of rows.
    "rows of no embedding": (
        (TABLE, {"t": ROWS}, [Name("t", "t", "io")]), {},
        "  t: has rows, but is not an embedding under `names`",
    ),
    "different rows alone": (
        (TABLE | {"u": TABLE["t"]}, {"t": ROWS, "u": ROWS._replace(rows=(1, 2, 3))},
         [Name("[tu]", r"m.\g<0>", "vo")]), {},
        "`adapter` has only rows of embeddings, and PEFT has one list of rows for all of them; got "
        "different rows at t, u. Save each embedding by itself",
    ),
    "another method": (
        (BASE, LOW, [W]), {"config": {"peft_type": "VERA"}},
        "`config` cannot be written:\n  peft_type: expected 'LORA', got 'VERA'; "
        "leave peft_type out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_WRITTEN)
def test_save_refuses(case: str, tmp_path: Folder) -> None:
    """Before a file is made; `tensors` does, too."""
    (base, adapter, names), options, message = NOT_WRITTEN[case]
    for call in (peft.tensors, functools.partial(peft.save, tmp_path / "a")):
        with pytest.raises(TypeError if not names else ValueError, match=re.escape(message)):
            call(base, adapter, names, **options)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- what is not read

LAYER = PREFIX + "encoder.layer.0.attention.self."
Q, V, HEAD = LAYER + "query", LAYER + "value", PREFIX + "lm_head"
NORM = "encoder.layer.0.output.LayerNorm"


def header(key: str, shape: list[int], *more: str) -> Damage:
    """Tensors of four bytes, one after the other in the same place."""
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}
    return lambda f: f.header(dict.fromkeys((key, *more), entry), b"\0" * 4)


def cut(size: int) -> Damage:
    return lambda f: os.truncate(f.folder / TENSORS, size % (f.folder / TENSORS).stat().st_size)


def text(file: str, data: bytes) -> Damage:
    return lambda f: (f.folder / file).write_bytes(data)


QV: dict[str, tuple[Damage, str]] = {
    "missing": (drop(Q + ENDS[1]), f"  {Q}{ENDS[1]}: missing, though {Q}{ENDS[0]} is there"),
    "unexpected": (
        copy(Q, LAYER + "key"),
        f"  {LAYER}key: unexpected; adapter_config.json does not select it",
    ),
    "selected": (
        drop(*(Q + end for end in ENDS)),
        "  encoder.layer.0.attention.self.query.weight: selected by adapter_config.json, but "
        "missing in adapter_model.safetensors",
    ),
    "beside": (
        copy(Q, PREFIX + "x.query"),
        f"  {PREFIX}x.query: unexpected; it matches no leaf of `base` under `names`",
    ),
    "kind": (
        change(lambda t: [t.update({f"{Q}.lora_embedding_{x}": t.pop(f"{Q}.lora_{x}.weight")})
                          for x in "AB"]),
        f"  {Q}: A and B are of kind embedding, but encoder/layer/0/attention/",
    ),
    "a norm": (
        all_of(
            say(target_modules=["query", "value", "output.LayerNorm"]),
            change(lambda t: t.update({PREFIX + k: x for k, x in pair(NORM, 2, 16, 16).items()})),
        ),
        f"  {PREFIX}{NORM}: has A and B, but encoder/layer/0/output/LayerNorm/scale is a "
        "parameter that LoRA cannot adapt",
    ),
    "beside A and B": (
        all_of(
            say(modules_to_save=None, ensure_weight_tying=True, target_modules=["lm_head"]),
            change(lambda t: t.clear() or t.update(pair(HEAD, 2, 8, 9))),
            put(HEAD + ".weight", np.zeros((9, 8), np.float32)),
        ),
        f"  {HEAD}.weight: in full, but lm_head also has A and B",
    ),
    "two biases": (
        all_of(
            say(bias="all"),
            put(Q + ".bias", np.zeros(8, np.float32)),
            put(Q + ".base_layer.bias", np.zeros(8, np.float32)),
        ),
        f"  {Q}.bias: duplicate, with and without base_layer",
    ),
    "prefix": (
        put("../../x", np.zeros(2)), f"  ../../x: unexpected; PEFT's keys start with {PREFIX!r}"
    ),
    "misshapen": (
        put(V + ENDS[0], np.zeros((2, 9), np.float32)),
        f"  {V}{ENDS[0]}: expected shape (2, 8), got (2, 9)",
    ),
    "rank": (say(r=3), f"  {Q}: expected rank 3 by adapter_config.json, got an A of shape (2, 8)"),
    "dtype": (
        put(V + ENDS[0], np.zeros((2, 8), np.int32)),
        f"  {V}{ENDS[0]}: expected a floating-point dtype, got I32",
    ),
    "float64": (
        put(V + ENDS[0], np.zeros((2, 8))), f"  {V}{ENDS[0]}: dtype F64 needs jax_enable_x64"
    ),
    "nan": (
        change(lambda t: t[V + ENDS[0]].__setitem__((0, 1), np.nan)),
        f"  {V}{ENDS[0]}: 1 of 16 values are not finite",
    ),
    "future": (
        say(use_tomorrow={"a": 1}),
        "  use_tomorrow: {'a': 1} is not known to jlora, and may change what the adapter computes; "
        "if it does not, name the field in `ignore`",
    ),
    "pissa": (
        say(init_lora_weights="pissa_niter_16"),
        "  init_lora_weights: 'pissa_niter_16' changes the base model, which the adapter needs; "
        "convert the adapter in PEFT (path_initial_model_for_weight_conversion)",
    ),
    "r": (say(r=True), "  r: expected an integer of at least 1, got True"),
    "alpha": (say(lora_alpha="1"), "  lora_alpha: expected a finite number, got '1'"),
    "pattern": (
        say(target_modules="query|(?=(a+)+$)" + "a" * 10_000),
        "' has 10016 characters; expected at most 10000",
    ),
    "deep tensors": (
        change(lambda t: [t.update({f"{Q}.base_layer{x}": t.pop(Q + x)}) for x in ENDS]),
        f"  {Q}: adapted more than once",
    ),
    "a group of ours": (
        say(layers_to_transform=[0], layers_pattern="(?P<idx>x)"),
        "is not a regular expression: redefinition of group name",
    ),
    "no pattern": (say(rank_pattern={"(": 2}), "  rank_pattern: '(' is not a regular expression"),
    "cut header": (cut(900), "has 900 bytes, but claims a header of"),
    "cut data": (cut(-4), "bytes of data; its header describes"),
    "empty": (text(TENSORS, b""), "has 0 bytes, but claims a header of 0"),
    "lying length": (
        text(TENSORS, b"\xff" * 8 + b"{}"), "claims a header of 18446744073709551615"
    ),
    "twice": (
        lambda f: f.header(
            json.dumps(f.split[0]).replace("{", '{"__metadata__":{},', 1), f.split[1]
        ),
        f"the header of {TENSORS} is not valid JSON: the key '__metadata__' is duplicated",
    ),
    "twice in the configuration": (
        text(CONFIG, b'{"r": 1, "r": 2}'), f"{CONFIG} is not valid JSON: the key 'r' is duplicated"
    ),
    "deep": (text(CONFIG, b"[" * 100_000), f"{CONFIG} is"),
    "large": (
        text(CONFIG, b'{"r": 1}' + b" " * 2**23),
        f"{CONFIG} has 8388616 bytes; expected at most 4194304",
    ),
    "infinite": (text(CONFIG, b'{"r": Infinity}'), "Infinity is not a JSON number"),
    "list": (text(CONFIG, b"[]"), "must be a JSON object; got list"),
    "huge shape": (header("x", [2**40, 2**40]), "has an invalid entry for 'x'"),
    "negative shape": (header("x", [-1]), "has an invalid entry for 'x'"),
    "odd name": (header("a\nb", [1]), "has a tensor named 'a\\nb'; expected at most"),
    "overlap": (header("x", [1], "y"), "'y' starts at byte 0 of the data; expected byte 4"),
}  # fmt: skip


AT_Q, AT_K = (f"{PREFIX}model.layers.0.self_attn.{x}_proj" for x in "qk")
M = ".lora_magnitude_vector"
EMBED = PREFIX + "model.embed_tokens"
DELTA = ".token_adapter.trainable_tokens_delta"
INDICES = "trainable_token_indices"
ONES = np.ones(8, np.float32)
OF_DORA: dict[str, tuple[Damage, str]] = {
    "missing": (
        drop(AT_Q + M),
        f"  {AT_Q}{M}: missing, though {AT_Q}.lora_A.weight is there",
    ),
    "extra": (
        put(AT_K + M, ONES),
        f"{AT_K}{M}: unexpected; model.layers.0.self_attn.k_proj has no A and B",
    ),
    "longer": (
        put(AT_Q + M, np.ones(9, np.float32)),
        f"  {AT_Q}{M}: expected shape (8,), got (9,)",
    ),
    "zeros": (
        put(AT_Q + M, 0 * ONES),
        f"  {AT_Q}{M}: all 8 values are 0, so that the module would return zeros",
    ),
    "flag": (say(use_dora="yes"), "  use_dora: expected true or false, got 'yes'"),
    "off": (say(use_dora=False), f"  {AT_Q}{M}: unexpected; adapter_config.json has no use_dora"),
    "beside biases": (
        say(lora_bias=True),
        "  lora_bias: True cannot be combined with use_dora in PEFT",
    ),
    "of parameters": (
        say(target_parameters=["experts.up"]),
        "  target_parameters: ['experts.up'] cannot be combined with use_dora in PEFT",
    ),
}

ALL, AT = ".trainable_tokens_delta", f"  {EMBED}{DELTA}: "
LISTED = "distinct rows, an object with the rows of at most 100 modules, or null"


def listed(**rows: list[int]) -> Damage:
    """Other rows in the configuration, of modules by name."""
    return say(**{INDICES: {"embed_tokens": [9, 2, 3]} | rows})


OF_ROWS: dict[str, tuple[Damage, str]] = {
    "missing": (
        drop(EMBED + DELTA), f"  {INDICES}: selects rows, but adapter_model.safetensors has no"
    ),
    "not listed": (
        say(**{INDICES: None}), AT + f"unexpected; {INDICES} lists none of its rows"
    ),
    "listed twice": (
        listed(tokens=[1, 2, 4]), AT + f"unexpected; {INDICES} lists other rows too"
    ),
    "another head": (
        listed(q_proj=[9, 2, 3]),
        f"  {INDICES}: selects q_proj, but adapter_model.safetensors has no",
    ),
    "two": (
        put(PREFIX + "other" + DELTA, np.ones((3, 8), np.float32)),
        f"  {INDICES}: expected rows of one embedding; there are values for 2",
    ),
    "more rows": (
        put(EMBED + DELTA, np.ones((4, 8), np.float32)), AT + "expected shape (3, 8), got (4, 8)"
    ),
    "beyond": (
        say(**{INDICES: [1, 2, 11]}),
        f"  model.embed_tokens: {INDICES} lists row 11, but there are 11 rows; resize",
    ),
    "of a linear module": (
        all_of(listed(k_proj=[1]), put(AT_K + DELTA, ONES[None])),
        f"{AT_K}{DELTA}: has rows, but is not an embedding under `names`",
    ),
    "of the head alone": (
        all_of(listed(lm_head=[1]), put(HEAD + DELTA, ONES[None])),
        f"{HEAD}{DELTA}: has rows, but shares the weight of model.embed_tokens, which has",
    ),
    "beside A and B": (
        all_of(
            put(EMBED + ".lora_embedding_A", np.ones((2, 11), np.float32)),
            put(EMBED + ".lora_embedding_B", np.ones((8, 2), np.float32)),
        ),
        AT + "its module is also adapted or saved as a whole",
    ),
    "beside the whole": (
        say(modules_to_save=["embed_tokens"]), AT + "its module is also adapted or saved as a whole"
    ),
    "another table": (
        put(EMBED + ".token_adapter.base_layer.weight", np.ones((11, 8), np.float32)),
        f"  {EMBED}.token_adapter.base_layer.weight: expected the values of `base` at ",
    ),
} | {
    f"rows {wrong!r}": (say(**{INDICES: wrong}), f"  {INDICES}: expected {LISTED}, got {wrong!r}")
    for wrong in ([1, 2, -1], [1, 2, 2], [], "123", [True, 2, 3])
}  # fmt: skip
ROWS_ALONE: dict[str, tuple[Damage, str]] = {
    "no rows": (say(token_indices=[]), "  token_indices: expected distinct rows, got []"),
    "A": (
        put(AT_Q + ".lora_A.weight", np.ones((2, 8), np.float32)),
        f"  {AT_Q}.lora_A.weight: unexpected; adapter_config.json does not select it",
    ),
    "integers": (
        put(EMBED + ALL, np.ones((3, 8), np.int64)),
        f"  {EMBED}{ALL}: expected a floating-point dtype, got I64",
    ),
    "missing": (
        change(lambda t: t.clear() or t.update({AT_Q: ONES})),
        "model.embed_tokens.weight: selected by adapter_config.json, but missing in ",
    ),
    "feature": (say(r=8), "  r: 8 is a feature that jlora does not support"),
    "nothing": (
        say(target_modules=None),
        f"  {EMBED}{ALL}: unexpected; adapter_config.json does not select it",
    ),
}

OF_METHODS: dict[str, tuple[Damage, str]] = {
    "another method": (
        say(peft_type="ADALORA"),
        "got 'ADALORA'; convert it to LoRA in PEFT with peft.save_as_lora; if PEFT",
    ),
    "no method": (say(peft_type=["LORA"]), "set it to the method of the adapter"),
}
OF_TIED_DORA: dict[str, tuple[Damage, str]] = {
    "embedding": (
        all_of(
            say(target_modules=".*(proj|embed_tokens)"),
            put(EMBED + ".lora_embedding_A", np.ones((2, 11), np.float32)),
            put(EMBED + ".lora_embedding_B", np.ones((8, 2), np.float32)),
            put(EMBED + M, ONES),
        ),
        "model.embed_tokens: DoRA is not supported for a weight that lm_head shares",
    ),
}
GPT2_HEAD = PREFIX + "lm_head.lora_B.weight"
EMBEDDING = EMBED + ".base_layer.weight"
OF_TIED: dict[str, tuple[Damage, str]] = {
    "changed": (
        change(lambda t: t.update({EMBEDDING: t[EMBEDDING] + 1})),
        f"{EMBEDDING}: expected the values of `base` at params/embed",
    ),
    "one side": (
        say(ensure_weight_tying=False),
        "embed_tokens: adapted without lm_head, which shares its",
    ),
}
OF_GPT2: dict[str, tuple[Damage, str]] = {
    "another head": (
        change(lambda t: t.update({GPT2_HEAD: 2 * t[GPT2_HEAD]})),
        f"{GPT2_HEAD}: expected the transpose of {PREFIX}transformer.wte.lora_embedding_A",
    ),
}
OF_LAYERS: dict[str, tuple[Damage, str]] = {
    "ranks": (
        say(rank_pattern={"layers.1.mlp.down_proj": 3}),
        "layers/mlp/down/kernel: its layers are one leaf but differ: rank 3 and scale 2,",
    ),
    "one of two": (
        say(target_modules=["0.mlp.up_proj", "down_proj"]),
        "layers/mlp/up/kernel: its layers are one leaf, but only 1 of 2 are adapted",
    ),
}


def instead(file: str, make: Callable[[Folder], Any]) -> Damage:
    """Something else in the place of a file."""

    def damage(f: Files) -> None:
        path = f.folder / file
        path.rename(f.folder.parent / "outside")
        make(path)

    return damage


def link(path: Folder) -> None:
    path.symlink_to(path.parent.parent / "outside")


ODD_FILES: dict[str, tuple[Damage, str]] = {
    said.format(file): (instead(file, make), said.format(file))
    for file in (CONFIG, TENSORS)
    for said, make in {
        "has no {}": lambda path: None,
        "{} is a link out of the folder, to": link,
        "{} is not a regular file": os.mkfifo,
    }.items()
}
ODD_FILES["pickle"] = (
    instead(TENSORS, lambda path: (path.parent / "adapter_model.bin").write_bytes(b"code")),
    "has adapter_model.bin, a pickle",
)
DAMAGES = {
    (name, damage): found
    for name, each in {
        "qv": QV | ODD_FILES | OF_METHODS,
        "tied": OF_TIED,
        "gpt2_tied": OF_GPT2,
        "scanned": OF_LAYERS,
        "dora_scanned": OF_TIED_DORA,
        "dora": OF_DORA,
        "tokens": OF_ROWS,
        "alone": ROWS_ALONE,
    }.items()
    for damage, found in each.items()
}
METHODS = ("dora", "tokens", "alone")
# What nothing but the tree of the model can tell.
OF_TREES = {"of a linear module", "of the head alone", "another table"}


def files(name: str, folder: Folder) -> Files:
    """A copy of a fixture; `alone` is one of rows and nothing else."""
    if name != "alone":
        return Files(folder, name)
    case = models.case("tokens")
    adapter = peft.load(case.folder, case.base, case.names)
    rows = {"params": {"embed": adapter["params"]["embed"]}}
    peft.save(folder / "source", case.base, rows, case.names)
    return Files(folder, name, case._replace(folder=folder / "source"))


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_load_refuses(name: str, damage: str, tmp_path: Folder) -> None:
    """Each by name; of methods onto a checkpoint too, with the same words; nothing is written."""
    damaging, message = DAMAGES[name, damage]
    found = files(name, tmp_path)
    damaging(found)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as caught:
        found.load()
    assert str(caught.value).startswith("`path`: ")
    if name in METHODS and damage not in OF_TREES:
        _, base = fixture("tokens" if name == "alone" else name, tmp_path)
        with pytest.raises(ValueError, match=re.escape(message)):
            peft.export_merged(base, found.folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["qv", "dora", "tokens", "alone"])
def test_what_is_damaged_was_sound(name: str, tmp_path: Folder) -> None:
    """A pickle beside a safetensors file is not looked at."""
    found = files(name, tmp_path)
    (found.folder / "adapter_model.bin").write_bytes(b"code")
    found.load()
    with pytest.raises(FileNotFoundError, match="`path`: there is no folder"):
        peft.load(tmp_path / "nowhere", found.case.base, found.case.names)


def test_all_problems_are_listed_at_once(tmp_path: Folder) -> None:
    """One error names everything that is wrong with the tensors."""
    files = Files(tmp_path)
    wrong = np.zeros((4, 4), np.float32)
    all_of(drop(Q + ENDS[0]), put("x", np.zeros(3)), put(V + ENDS[1], wrong))(files)
    with pytest.raises(ValueError) as caught:
        files.load()
    assert str(caught.value) == (
        f"`path`: the adapter in {files.folder} cannot be loaded onto `base` with `names`; nothing "
        "was loaded. 3 problems:\n"
        f"  x: unexpected; PEFT's keys start with {PREFIX!r}\n"
        f"  {Q}{ENDS[0]}: missing, though {Q}{ENDS[1]} is there\n"
        f"  {V}{ENDS[1]}: expected shape (8, 2), got (4, 4)"
    )


def test_a_sparse_file_allocates_nothing(tmp_path: Folder) -> None:
    """A header that is right about a terabyte of zeros is refused by its shapes."""
    files = Files(tmp_path)
    entry = {"dtype": "F32", "shape": [2, 2**37], "data_offsets": [0, 2**40]}
    b = {"dtype": "F32", "shape": [0, 2], "data_offsets": [2**40, 2**40]}
    files.header({LAYER + "query" + end: x for end, x in zip(ENDS, (entry, b), strict=True)}, b"")
    try:
        os.truncate(files.folder / TENSORS, 2**40 + (files.folder / TENSORS).stat().st_size)
    except OSError:
        pytest.skip("no sparse files of a terabyte here")
    with pytest.raises(ValueError, match=r"expected shape \(2, 8\), got \(2, 137438953472\)"):
        files.load()


@pytest.mark.parametrize("form", ["list", "by name", "alone"])
def test_many_rows_of_many_modules_take_no_time(form: str, tmp_path: Folder) -> None:
    """A list of a hundred thousand rows, and two thousand modules with values."""
    found = files("alone" if form == "alone" else "tokens", tmp_path)
    rows, end = list(range(99_999)), DELTA
    if form == "alone":
        found.config(token_indices=rows, target_modules=".*")
        end = ALL
    else:
        many = {f"m{i}": rows[:900] for i in range(99)}
        found.config(**{INDICES: rows if form == "list" else many})
    few = {f"{PREFIX}m{i}{end}": np.ones((1, 1), np.float32) for i in range(2_000)}
    found.tensors(lambda t: t.update(few))
    with bounded(), pytest.raises(ValueError, match=r"expected (rows of|at most 100)"):
        peft.read(found.folder)


def test_many_biases_without_a_and_b_take_no_time(tmp_path: Folder) -> None:
    """Their scales, by a pattern that is tried in a process of its own, are found together."""
    found = Files(tmp_path)
    found.config(lora_bias=True, alpha_pattern={"[q]+": 5})
    many = {f"{PREFIX}m{i}.lora_B.bias": np.ones(1, np.float32) for i in range(500)}
    found.tensors(lambda t: t.update(many))
    with (
        bounded(),
        pytest.raises(ValueError, match=r"m0\.lora_B\.bias: lora_bias is supported only"),
    ):
        peft.read(found.folder)
