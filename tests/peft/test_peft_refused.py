"""What has no form in PEFT's files, and files that are damaged: refused as a whole, by name."""

import functools
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import refused
from own_methods import Gain
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

import jlora
from jlora import DoRA, Full, LoRA, Rows, peft
from jlora.peft import Name
from jlora.types import Decomposed, Layout, Replaced
from tests.peft.merge.test_peft_merged import fixture
from tests.peft.test_peft_methods import NAMES, STACK

# ---------------------------------------------------------------------------- what is not written

W = Name("w", "m", "io")
BASE, LOW = {"w": np.zeros((4, 6), np.float32)}, {"w": node(W, (4, 6))}
STACKED = {"w": np.ones((3, 8, 6), np.float32)}
DORA = node(STACK, (3, 8, 6), cls=Decomposed)
SLOTS, NORMS = Layout((0,), (1,), (2,), (3, (2, 0), 2)), Layout((), (0, 1), (2,))
TABLE = {"t": np.ones((7, 4), np.float32)}
ROWS = Replaced(np.ones((3, 4), np.float32), (6, 1, 3), Layout((), (0,), (1,)))
VLLM = {"profile": "vllm"}
TYPED = "Give such arrays, adapt other leaves"


def of_kind(axes: str, *shape: int, **options: Any) -> Any:
    """Base, adapter and table of one leaf of some kind."""
    name = Name("w", "m", axes, **options)
    return {"w": np.zeros(shape, np.float32)}, {"w": node(name, shape)}, [name]


def with_bias(dtype: Any) -> Any:
    """A module that is trained in full, but for a bias."""
    kernel = {"q": {"kernel": np.ones((4, 3), np.float32)}}
    return {"q": kernel["q"] | {"bias": np.ones(3).astype(dtype)}}, kernel, NAMES


# Base, adapter and table; the options of `save`; the argument, the place, what was got, the remedy.
NOT_WRITTEN: dict[str, tuple[Any, ...]] = {
    "no names": ((BASE, LOW, []), {}, "names", "", "got [].", "such as jlora.peft.TABLES['llama']"),
    "one name": ((BASE, LOW, W), {}, "names", "", "must be a table", "got Name("),
    "unnamed": ((BASE, LOW, [Name("v", "m", "io")]), {}, "adapter", "w", "no row of `names` fits"),
    "unnamed in a collection": (  # as rows have it, whose paths leave out a leading params/
        ({"params": BASE}, {"params": LOW}, [Name("params/w", "m", "io")]), {},
        *("adapter", "params/w", "no row of `names` fits"),
    ),
    "nan": (
        (BASE, {"w": LOW["w"]._replace(b=np.full((2, 6), np.nan, "f"))}, [W]), {},
        *("adapter", "w", "not finite"),
    ),
    "abstract": (
        (BASE, jax.eval_shape(lambda: LOW), [W]), {}, "adapter", "w", "got jax.ShapeDtypeStruct"
    ),
    "one name twice": (
        (BASE | {"v": BASE["w"]}, LOW, [Name("[wv]", "m", "io")]), {},
        *("names", "m.weight", "v, w", "Narrow its patterns."),
    ),
    "inseparable": (  # of three names, each of which ends with the next
        (dict.fromkeys("uvw", BASE["w"]), dict.fromkeys("uw", LOW["w"]),
         [W, Name("v", "x.m", "io"), Name("u", "y.x.m", "io")]), {},
        *("adapter", "", "cannot be selected apart from others"),
    ),
    "A and B in what is saved": (  # by its name, which ends like the other
        ({"w": BASE["w"], "v": np.ones((4, 6), "f")}, LOW | {"v": np.ones((4, 6), "f")},
         [Name("w", "x.m", "io"), Name("v", "m", "io")]), {},
        *("adapter", "base_model.model.x.m", "in modules_to_save"),
    ),
    "no value for JSON": (
        (BASE, LOW, [W]), {"config": {"base_model_name_or_path": 1j}},
        *("config", "base_model_name_or_path", "expected a value for JSON, got 1j"),
    ),
    "a number as a pattern": (
        (BASE, LOW, [W]), {"config": {"rank_pattern": {5: 2}}}, "config", "rank_pattern", "{5: 2}"
    ),
    "integers beside it": (with_bias(np.int32), {}, "base", "q/bias", "got int32", TYPED),
    "eight bits beside it": (
        with_bias(jnp.float8_e4m3fn), {}, "base", "q/bias", "got float8_e4m3fn", TYPED
    ),
    "dropout rates": (
        (BASE | {"v": BASE["w"]}, LOW | {"v": LOW["w"]._replace(dropout=0.1)},
         [Name("([vw])", r"m.\1", "io")]), {}, "adapter", "", "the dropout rates [0.0, 0.1]",
    ),
    "another profile": ((BASE, LOW, [W]), {"profile": "tgi"}, "profile", "", "got 'tgi'"),
    "a long name": (
        (BASE, LOW, [Name("w", "m" * 1000, "io")]), {},
        *("adapter", "", "expected at most 1000 printable characters, with at most 100 dots"),
    ),
    "a feature": (
        (BASE, LOW, [W]), {"config": {"use_qalora": True}}, "config", "use_qalora", "True is a fea"
    ),
    # By vLLM.
    "a convolution": (of_kind("kio", 3, 4, 6), VLLM, "profile", "m", "of kind conv"),
    "experts": (
        of_kind("eio", 3, 4, 6, parameter="up"), VLLM,
        *("profile", "m.up", "experts without m.gate_up_proj"),
    ),
    "a bias": (
        ({"q": {"kernel": np.ones((4, 6), "f"), "bias": np.ones(6, "f")}},
         {"q": {"kernel": LOW["w"], "bias": np.ones(6, "f")}}, NAMES),
        VLLM, "profile", "q.bias", "trained in full",
    ),
    "DoRA for vLLM": ((STACKED, {"w": DORA}, [STACK]), VLLM, "profile", "w.0", "DoRA"),
    # Of DoRA.
    "some slots": (
        (STACKED, {"w": node(SLOTS, (3, 8, 6), cls=Decomposed)}, [STACK]), {},
        *("adapter", "w", "slots (2, 0) only"),
    ),
    "some parts": (
        ({x: np.ones((8, 6), "f") for x in "vw"}, {"w": node(W, (8, 6), cls=Decomposed)},
         [Name(x, "m", "io", part=(i, 2)) for i, x in enumerate("vw")]), {},
        *("adapter", "w", "only 1 of the 2 parts of m.weight"),
    ),
    "magnitudes of 0": (
        (STACKED, {"w": DORA._replace(m=0 * DORA.m)}, [STACK]), {}, "adapter", "w", "all 0"
    ),
    "DoRA of experts": (
        (STACKED, {"w": DORA}, [Name("w", "e", "eio", "e")]), {}, "adapter", "w", "of experts"
    ),
    "dropout of experts": (
        (STACKED, {"w": node(STACK.layout, (3, 8, 6))._replace(dropout=0.1)},
         [Name("w", "e", "eio", "e")]), {},
        *("adapter", "", "the dropout rate 0.1", "config={'lora_dropout': 0.0}"),
    ),
    "other norms": (
        (STACKED, {"w": node(NORMS, (3, 8, 6), cls=Decomposed)}, [STACK]), {},
        *("adapter", "w", "norms over axes (0, 1)"),
    ),
    "another method": (
        (BASE, LOW, [W]), {"config": {"peft_type": "VERA"}},
        *("config", "peft_type", "got 'VERA'", "Leave peft_type out"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_WRITTEN)
def test_save_refuses(case: str, tmp_path: Folder) -> None:
    """Before a file is made; `tensors` does, too."""
    trees, options, *facts = NOT_WRITTEN[case]
    for call in (peft.tensors, functools.partial(peft.save, tmp_path / "a")):
        with refused(TypeError if case in ("no names", "one name") else ValueError, *facts):
            call(*trees, **options)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------- what is known before training

TOKENS = np.array([[1, 2, 0]])
WEIGHTS = {
    "embed": np.ones((7, 4), np.float32),
    "up": np.ones((4, 6), np.float32),
    "down": np.ones((6, 4), np.float32),
}
ROW = Name("embed", "embed", "vo")
UP, DOWN = Name("up", "mlp.up_proj", "io"), Name("down", "mlp.down_proj", "io")

# Rules and a table; the leaves without a form, each with the reason.
UNHELD: dict[str, tuple[list[Any], list[Name], dict[str, str]]] = {
    "all have one": (
        [LoRA("up", rank=2), LoRA("embed", rank=2), Full("down")], [ROW, UP, DOWN], {}
    ),
    "rows": ([LoRA("up", rank=2), Rows("embed", (1, 2))], [ROW, UP, DOWN], {}),
    "no row": ([LoRA(rank=2)], [ROW, UP], {"down": "no row of `names` fits 'down' with 2 axes"}),
    "no inputs": (
        [LoRA(rank=2)], [ROW, Name("up", "m", "ok"), DOWN], {"up": "without inputs (axes 'ok')"}
    ),
    "a row that refuses": (
        [LoRA("up", rank=2), Full("embed")],
        [Name("embed", "embed", "vo", refused="nobody calls it"),
         Name("up", "m", "io", refused="nobody calls it"), DOWN],
        {"up": "PEFT has no form for an adapter of it: nobody calls it"},
    ),
    "another method": ([Gain("up")], [ROW, UP, DOWN], {"up": "no form for a GainNode"}),
    "two methods": (
        [DoRA("up", rank=2), LoRA("down", rank=2)], [ROW, UP, DOWN],
        {"up": "down is LoRA, but PEFT has one `use_dora` for all"},
    ),
    "tied": (
        [DoRA("embed", rank=2)], [Name("embed", "embed", "vo", tied="head"), UP, DOWN],
        {"embed": "head shares it"},
    ),
    "rows of no embedding": (
        [Rows("embed", (1, 2))], [Name("embed", "m", "io"), UP, DOWN],
        {"embed": "is not an embedding under `names`"},
    ),
    "a part": (
        [Full("up")], [ROW, Name("up", "m", "io", part=(0, 2)), DOWN], {"up": "only a part"}
    ),
    "another orientation": (
        [LoRA("(up|down)", rank=2)], [ROW, UP, Name("down", "m", "oi")],
        {"down": "got Layout(stack=(), inputs=(0,)"},
    ),
    "DoRA beside experts": (
        [DoRA("up", rank=2)], [ROW, UP, Name("down", "mlp.experts.0.down_proj", "io")],
        {"up": "PEFT takes its name for that of experts"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNHELD)
def test_check_sites(case: str, tmp_path: Folder) -> None:
    """What `save` refuses after training, in the same words."""
    rules, names, expected = UNHELD[case]

    def apply(params: Any, ids: Any) -> Any:
        return params["embed"][ids] @ params["up"] @ params["down"]

    lora = jlora.transform(apply, *rules)
    found = peft.check_sites(lora.sites(WEIGHTS, TOKENS), names)
    assert [problem.where for problem in found] == [*expected]
    assert all(expected[problem.where] in problem.why for problem in found)
    base, adapter = lora.init(jax.random.key(0), WEIGHTS, TOKENS)
    if not expected:
        peft.save(tmp_path / "a", base, adapter, names)
        return
    with refused(ValueError, "adapter", *expected) as caught:
        peft.save(tmp_path / "a", base, adapter, names)
    assert caught.value.problems == found  # pyright: ignore


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


Damages = dict[str, tuple[Any, ...]]  # each with the place of the problem, and what was got
QV: Damages = {
    "missing": (drop(Q + ENDS[1]), Q + ENDS[1], f"missing, though {Q}{ENDS[0]} is there"),
    "unexpected": (copy(Q, LAYER + "key"), LAYER + "key", "does not select it"),
    "selected": (
        drop(*(Q + end for end in ENDS)),
        *("encoder.layer.0.attention.self.query.weight", f"missing in {TENSORS}"),
    ),
    "beside": (copy(Q, PREFIX + "x.query"), PREFIX + "x.query", "matches no leaf of `base`"),
    "kind": (
        change(lambda t: [t.update({f"{Q}.lora_embedding_{x}": t.pop(f"{Q}.lora_{x}.weight")})
                          for x in "AB"]),
        Q, "of kind embedding, but encoder/layer/0/attention/",
    ),
    "a norm": (
        all_of(
            say(target_modules=["query", "value", "output.LayerNorm"]),
            change(lambda t: t.update({PREFIX + k: x for k, x in pair(NORM, 2, 16, 16).items()})),
        ),
        PREFIX + NORM, "encoder/layer/0/output/LayerNorm/scale is a parameter that LoRA cannot",
    ),
    "beside A and B": (
        all_of(
            say(
                modules_to_save=None, ensure_weight_tying=True, target_modules=["lm_head"]
            ),
            change(lambda t: t.clear() or t.update(pair(HEAD, 2, 8, 9))),
            put(HEAD + ".weight", np.zeros((9, 8), np.float32)),
        ),
        HEAD + ".weight", "also has A and B",
    ),
    "two biases": (
        all_of(
            say(bias="all"),
            put(Q + ".bias", np.zeros(8, np.float32)),
            put(Q + ".base_layer.bias", np.zeros(8, np.float32)),
        ),
        Q + ".bias", "with and without base_layer",
    ),
    "prefix": (put("../../x", np.zeros(2)), "../../x", PREFIX),
    "misshapen": (put(V + ENDS[0], np.zeros((2, 9), np.float32)), V + ENDS[0], "got (2, 9)"),
    "rank": (say(r=3), Q, "expected rank 3 by adapter_config.json, got an A of shape (2, "),
    "dtype": (put(V + ENDS[0], np.zeros((2, 8), np.int32)), V + ENDS[0], "got I32"),
    "float64": (put(V + ENDS[0], np.zeros((2, 8))), V + ENDS[0], "F64 needs jax_enable_x64"),
    "nan": (change(lambda t: t[V + ENDS[0]].__setitem__((0, 1), np.nan)), V + ENDS[0], "1 of 16"),
    "future": (
        say(use_tomorrow={"a": 1}),
        *("use_tomorrow", "{'a': 1} is not known", "name the field in `ignore`"),
    ),
    "pissa": (
        say(init_lora_weights="pissa_niter_16"),
        *("init_lora_weights", "'pissa_niter_16'", "path_initial_model_for_weight_conversion"),
    ),
    "r": (say(r=True), "r", "got True"),
    "r, too large": (say(r=2**31), "r", "got 2147483648"),
    "alpha": (say(lora_alpha="1"), "lora_alpha", "got '1'"),
    "deep tensors": (
        change(lambda t: [t.update({f"{Q}.base_layer{x}": t.pop(Q + x)}) for x in ENDS]),
        *(Q, "adapted more than once"),
    ),
    "a long name": (put("m" * 1001, np.zeros(2)), TENSORS, "expected at most 1000 printable"),
    "a deep name": (put(".m" * 101, np.zeros(2)), TENSORS, "with at most 100 dots"),
    "a group of ours": (
        say(layers_to_transform=[0], layers_pattern="(?P<idx>x)"),
        *("layers_pattern", "redefinition of group name"),
    ),
    "no pattern": (say(rank_pattern={"(": 2}), "rank_pattern", "'('"),
    "cut header": (cut(900), TENSORS, "has 900 bytes"),
    "cut data": (cut(-4), TENSORS, "bytes of data; its header describes"),
    "empty": (text(TENSORS, b""), TENSORS, "has 0 bytes, but claims a header of 0"),
    "lying length": (text(TENSORS, b"\xff" * 8 + b"{}"), TENSORS, "of 18446744073709551615"),
    "twice": (
        lambda f: f.header(
            json.dumps(f.split[0]).replace("{", '{"__metadata__":{},', 1), f.split[1]
        ),
        *(TENSORS, "the key '__metadata__' is duplicated"),
    ),
    "twice in the configuration": (text(CONFIG, b'{"r": 1, "r": 2}'), CONFIG, "the key 'r' is dup"),
    "deep": (text(CONFIG, b"[" * 100_000), CONFIG),
    "large": (text(CONFIG, b'{"r": 1}' + b" " * 2**23), CONFIG, "has 8388616 bytes"),
    "infinite": (text(CONFIG, b'{"r": Infinity}'), CONFIG, "Infinity"),
    "list": (text(CONFIG, b"[]"), CONFIG, "got list"),
    "huge shape": (header("x", [2**40, 2**40]), TENSORS, "entry for 'x'"),
    "negative shape": (header("x", [-1]), TENSORS, "entry for 'x'"),
    "odd name": (header("a\nb", [1]), TENSORS, "'a\\nb'"),
    "overlap": (header("x", [1], "y"), TENSORS, "'y' starts at byte 0 of the data"),
}  # fmt: skip


AT_Q, AT_K = (f"{PREFIX}model.layers.0.self_attn.{x}_proj" for x in "qk")
M = ".lora_magnitude_vector"
EMBED = PREFIX + "model.embed_tokens"
DELTA = ".token_adapter.trainable_tokens_delta"
INDICES = "trainable_token_indices"
ONES = np.ones(8, np.float32)
OF_DORA: Damages = {
    "missing": (drop(AT_Q + M), AT_Q + M, f"missing, though {AT_Q}.lora_A.weight is there"),
    "extra": (put(AT_K + M, ONES), AT_K + M, "model.layers.0.self_attn.k_proj has no A and B"),
    "longer": (put(AT_Q + M, np.ones(9, np.float32)), AT_Q + M, "got (9,)"),
    "zeros": (put(AT_Q + M, 0 * ONES), AT_Q + M, "all 8 values are 0"),
    "flag": (say(use_dora="yes"), "use_dora", "got 'yes'"),
    "off": (say(use_dora=False), AT_Q + M, "adapter_config.json has no use_dora"),
    "beside biases": (say(lora_bias=True), "lora_bias", "True cannot be combined"),
    "of parameters": (
        say(target_parameters=["experts.up"]), "target_parameters", "['experts.up'] cann"
    ),
}  # fmt: skip

AT = EMBED + DELTA


def listed(**rows: list[int]) -> Damage:
    """Other rows in the configuration, of modules by name."""
    return say(**{INDICES: {"embed_tokens": [9, 2, 3]} | rows})


OF_ROWS: Damages = {
    "missing": (drop(AT), INDICES, f"selects rows, but {TENSORS} has no"),
    "not listed": (say(**{INDICES: None}), AT, "lists none of its rows"),
    "listed twice": (listed(tokens=[1, 2, 4]), AT, "lists other rows too"),
    "another head": (listed(q_proj=[9, 2, 3]), INDICES, f"selects q_proj, but {TENSORS} has no"),
    "two": (put(PREFIX + "other" + DELTA, np.ones((3, 8), np.float32)), INDICES, "values for 2"),
    "more rows": (put(AT, np.ones((4, 8), np.float32)), AT, "got (4, 8)"),
    "beyond": (say(**{INDICES: [1, 2, 11]}), "model.embed_tokens", "row 11, but there are 11 rows"),
    "of a linear module": (
        all_of(listed(k_proj=[1]), put(AT_K + DELTA, ONES[None])), AT_K + DELTA, "not an embedding"
    ),
    "of the head alone": (
        all_of(listed(lm_head=[1]), put(HEAD + DELTA, ONES[None])),
        *(HEAD + DELTA, "shares the weight of model.embed_tokens"),
    ),
    "beside the embedding": (
        put(EMBED + ".weight", np.ones((11, 8), np.float32)), AT, "adapted or saved as a whole"
    ),
    "beside A and B": (
        all_of(
            put(EMBED + ".lora_embedding_A", np.ones((2, 11), np.float32)),
            put(EMBED + ".lora_embedding_B", np.ones((8, 2), np.float32)),
        ),
        *(AT, "also adapted or saved as a whole"),
    ),
    "beside the whole": (say(modules_to_save=["embed_tokens"]), AT, "saved as a whole"),
    "another table": (
        put(EMBED + ".token_adapter.base_layer.weight", np.ones((11, 8), np.float32)),
        *(EMBED + ".token_adapter.base_layer.weight", "expected the values of `base` at "),
    ),
} | {
    f"rows {wrong!r}": (say(**{INDICES: wrong}), INDICES, f"got {wrong!r}")
    for wrong in ([1, 2, -1], [1, 2, 2], [], "123", [True, 2, 3])
}  # fmt: skip
OF_METHODS: Damages = {
    "another method": (say(peft_type="ADALORA"), "peft_type", "got 'ADALORA'", "peft.save_as_lora"),
    "rows alone": (
        say(peft_type="TRAINABLE_TOKENS", token_indices=[1]),
        *("peft_type", "got 'TRAINABLE_TOKENS'", "Merge it in PEFT"),
    ),
    "no method": (say(peft_type=["LORA"]), "peft_type", "['LORA']", "Set it to the met"),
}  # fmt: skip
OF_TIED_DORA: Damages = {
    "embedding": (
        all_of(
            say(target_modules=".*(proj|embed_tokens)"),
            put(EMBED + ".lora_embedding_A", np.ones((2, 11), np.float32)),
            put(EMBED + ".lora_embedding_B", np.ones((8, 2), np.float32)),
            put(EMBED + M, ONES),
        ),
        *("model.embed_tokens", "a weight that lm_head shares"),
    ),
}
GPT2_HEAD = PREFIX + "lm_head.lora_B.weight"
EMBEDDING = EMBED + ".base_layer.weight"
OF_TIED: Damages = {
    "changed": (
        change(lambda t: t.update({EMBEDDING: t[EMBEDDING] + 1})),
        *(EMBEDDING, "expected the values of `base` at params/embed"),
    ),
    "one side": (say(ensure_weight_tying=False), "model.embed_tokens", "adapted without lm_head"),
}  # fmt: skip
OF_GPT2: Damages = {
    "another head": (
        change(lambda t: t.update({GPT2_HEAD: 2 * t[GPT2_HEAD]})),
        *(GPT2_HEAD, f"expected the transpose of {PREFIX}transformer.wte.lora_embedding_A"),
    ),
}
OF_LAYERS: Damages = {
    "ranks": (
        say(rank_pattern={"layers.1.mlp.down_proj": 3}),
        *("params/layers/mlp/down/kernel", "rank 3 and scale 2,"),
    ),
    "one of two": (
        say(target_modules=["0.mlp.up_proj", "down_proj"]),
        *("params/layers/mlp/up/kernel", "only 1 of 2 are adapted"),
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


ODD_FILES: Damages = {
    said.format(file): (instead(file, make), "", said.format(file))
    for file in (CONFIG, TENSORS)
    for said, make in {
        "has no {}": lambda path: None,
        "{} is a link out of the folder, to": link,
        "{} is not a regular file": os.mkfifo,
    }.items()
}
ODD_FILES["pickle"] = (
    instead(TENSORS, lambda path: (path.parent / "adapter_model.bin").write_bytes(b"code")),
    *("", "has adapter_model.bin, a pickle"),
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
    }.items()
    for damage, found in each.items()
}
METHODS = ("dora", "tokens")
# What nothing but the tree of the model can tell.
OF_TREES = {"of a linear module", "of the head alone", "another table"}


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_load_refuses(name: str, damage: str, tmp_path: Folder) -> None:
    """Each by name; of methods onto a checkpoint too, with the same words; nothing is written."""
    damaging, *facts = DAMAGES[name, damage]
    found = Files(tmp_path, name)
    damaging(found)
    with refused((ValueError, FileNotFoundError), "path", *facts):
        found.load()
    if name in METHODS and damage not in OF_TREES:
        _, base = fixture(name, tmp_path)
        with refused(ValueError, "adapter", *facts):
            peft.export_merged(base, found.folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["qv", "dora", "tokens"])
def test_what_is_damaged_was_sound(name: str, tmp_path: Folder) -> None:
    """A pickle beside a safetensors file is not looked at."""
    found = Files(tmp_path, name)
    (found.folder / "adapter_model.bin").write_bytes(b"code")
    found.load()
    with refused(FileNotFoundError, "path", tmp_path / "nowhere", "there is no folder"):
        peft.load(tmp_path / "nowhere", found.case.base, found.case.names)


def test_all_problems_are_listed_at_once(tmp_path: Folder) -> None:
    """One error names everything that is wrong with the tensors."""
    files = Files(tmp_path)
    wrong = np.zeros((4, 4), np.float32)
    all_of(drop(Q + ENDS[0]), put("x", np.zeros(3, "f")), put(V + ENDS[1], wrong))(files)
    with refused(ValueError, "path", V + ENDS[1], "got (4, 4)") as caught:
        files.load()
    assert [x.where for x in caught.value.problems] == ["x", Q + ENDS[0], V + ENDS[1]]


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
    with refused(ValueError, "path", Q + ENDS[0], "got (2, 137438953472)"):
        files.load()


@pytest.mark.parametrize("form", ["list", "by name"])
def test_many_rows_of_many_modules_take_no_time(form: str, tmp_path: Folder) -> None:
    """A list of a hundred thousand rows, and two thousand modules with values."""
    found, rows = Files(tmp_path, "tokens"), list(range(99_999))
    many = {f"m{i}": rows[:900] for i in range(99)}
    found.config(**{INDICES: rows if form == "list" else many})
    few = {f"{PREFIX}m{i}{DELTA}": np.ones((1, 1), np.float32) for i in range(2_000)}
    found.tensors(lambda t: t.update(few))
    with bounded(), refused(ValueError, "path", INDICES):
        peft.read(found.folder)
