"""PEFT's files from strangers: whatever they say, an answer or an error comes with bounded work."""

import itertools
import json
import random
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from messages import refused
from peft_files import SECONDS, Folder, bounded, measure, pair, write
from small import some

from jlora import peft
from jlora.peft import _file
from jlora.peft._checkpoint import open_checkpoint
from jlora.peft.adapter._parts import Parameters, wholes
from jlora.peft.adapter._patterns import FORMS as FORM_LIMIT
from jlora.peft.adapter._patterns import LENGTH, list_bad_patterns, list_parents
from jlora.peft.adapter._roles import Roles, list_unused
from jlora.peft.formats._dequantize import dequantized, matrices
from jlora.peft.merge import _ties
from jlora.peft.merge._target import Target
from jlora.peft.places._find import find, stored_as_is
from tests.peft.merge.test_peft_merged import checkpoint as base


def adapter(folder: Folder, modules: Sequence[str], rank: int = 1, **fields: Any) -> Folder:
    """PEFT's files for modules with one input and one output."""
    tensors = {key: x for module in modules for key, x in pair(module, rank).items()}
    return write(folder, tensors, **{"r": rank} | fields)


TOO_MANY = r"has patterns of \d+ forms; expected at most 250"
ANSWERS = TOO_MANY + "|does not select it|target_parameters: expected names of at most 100"
ANY = r"(?i:[\0-\uffff])"  # which Python compiles for long
FORMS: dict[str, dict[str, Any]] = {
    "expressions": {"rank_pattern": {ANY * 50 + f"{i}": 1 for i in range(900)}},
    "names": {"alpha_pattern": {"a" * i + "." + "a" * (940 - i): 2 for i in range(940)}},
    "layers": {"layers_pattern": [f"x{i}|y" for i in range(10_000)]},
}


@pytest.mark.parametrize("case", FORMS)
def test_patterns_of_many_forms(case: str, tmp_path: Folder) -> None:
    """Each would be compiled, or looked up, for each module: they are refused before."""
    [field] = FORMS[case]
    folder = adapter(tmp_path / "a", many(1_000), layers_to_transform=[0], **FORMS[case])
    with bounded(2), refused(ValueError, "path", field, "forms; expected at most 250"):
        peft.read(folder)


# ------------------------------------------------------------------------------ the same answers

WORDS = st.sampled_from(["a", "b", "q", "aq", "a-b", "layers", "0", "12", "naïve"])
NAMES = st.lists(WORDS, min_size=1, max_size=5).map(".".join)
ESCAPED = NAMES.map(lambda name: name.replace(".", r"\.").replace("-", r"\-"))
ODD_PATTERNS = st.sampled_from(
    [".*q", "(a|b)", r"a\.\d+", "[ab]q?", "^a", "q$", "(?!b)a.*", "(?i)AQ", r"(a)\1?", ".", ""]
)
TARGETS = st.one_of(NAMES, NAMES.map(lambda x: "." + x), NAMES.map(lambda x: x[1:]))
SEARCHED = st.one_of(NAMES, ESCAPED, ODD_PATTERNS)


@hypothesis.given(SEARCHED, st.lists(NAMES, max_size=6))
@hypothesis.settings(max_examples=15, deadline=None)
def test_a_pattern_matches_what_it_does_in_python(pattern: str, names: list[str]) -> None:
    roles = Roles({"target_modules": pattern})
    assert [roles[x].adapts for x in names] == [bool(re.fullmatch(pattern, x)) for x in names]


def looked_up(patterns: dict[str, int], key: str) -> int:
    """As PEFT does: `get_pattern_key`."""
    matching = (p for p in patterns if re.match(rf"(.*\.)?({p})$", key))
    return patterns.get(next(matching, ""), 7)


@hypothesis.given(st.dictionaries(SEARCHED, st.integers(1, 9), max_size=6), st.lists(NAMES))
@hypothesis.settings(max_examples=10, deadline=None)
def test_ranks_are_looked_up_as_peft_does(patterns: dict[str, int], names: list[str]) -> None:
    patterns = {p: rank for p, rank in patterns.items() if p not in ("", "(?i)AQ")}
    fields = {"target_modules": ["q"], "rank_pattern": patterns, "r": 7}
    roles = Roles(fields)
    assert [roles[x].rank for x in names] == [looked_up(patterns, x) for x in names]
    idle = [p for p in patterns if not any(re.match(rf"(.*\.)?({p})$", n) for n in names)]
    assert list_unused(roles, names, (), ["q"], "it") == [
        f"rank_pattern: {p!r} matches no adapted module" for p in idle
    ]


@hypothesis.given(st.lists(TARGETS, max_size=6), st.lists(TARGETS, max_size=4), st.lists(NAMES))
@hypothesis.settings(max_examples=50, deadline=None)
def test_names_are_selected_as_peft_does(
    targets: list[str], saved: list[str], names: list[str]
) -> None:
    targets, saved = ([x for x in group if x] for group in (targets, saved))
    fields = {"target_modules": targets, "exclude_modules": saved, "modules_to_save": saved}
    fields |= {"target_parameters": targets}
    roles = Roles(fields)
    for name, role in ((name, roles[name]) for name in names):
        is_excluded, is_target = (
            any(name == t or name.endswith("." + t) for t in group) for group in (saved, targets)
        )
        assert role.adapts == (is_target and not is_excluded)
        parents = [".".join(name.split(".")[:n]) for n in range(1, 1 + len(name.split(".")))]
        holders = [parent for parent in parents if parent]
        assert role.saves == any(h.endswith(s) for h in holders for s in saved)
        if not role.adapts:
            for key in ("x", "q", "a"):
                wanted = any(
                    f"{name}.{key}" == t or f"{name}.{key}".endswith("." + t) for t in targets
                )
                assert (key in role.parameters) == wanted
    idle = [t for t in targets if not any(n == t or n.endswith("." + t) for n in names)]
    lost = [x for x in saved if not any(p.endswith(x) for n in names for p in list_parents(n))]
    assert list_unused(roles, (), names, names, "it") == [
        *(f"target_modules: {t!r} matches no module of it" for t in idle),
        *(f"target_parameters: {t!r} matches no module of it" for t in idle),
        *(f"modules_to_save: {x!r} matches none of the adapter's tensors" for x in lost),
    ]


# ------------------------------------------------------------------------------ long lists

MANY = 3_000


def many(of: int) -> list[str]:
    return [f"model.layers.{i // 10}.block.q{i % 10}" for i in range(of)]


LISTS: dict[str, Any] = {
    "targets": {"target_modules": many(MANY)},
    "ranks": {"rank_pattern": dict.fromkeys(many(MANY), 1)},
    "escaped ranks": {"rank_pattern": {name.replace(".", r"\.") + "$": 1 for name in many(MANY)}},
    "saved": {"modules_to_save": [f"x{name}" for name in many(MANY)]},
    "parameters": {"target_parameters": [name + ".weight" for name in many(MANY)]},
    "bare parameters": {"target_modules": [], "target_parameters": [f"w{i}" for i in range(MANY)]},
    "excluded": {"exclude_modules": [f"x{name}" for name in many(MANY)]},
}


EACH = itertools.product(LISTS, (1_000, 20_000))


@pytest.mark.parametrize("case", some(EACH, ("ranks", 1_000), ("bare parameters", 1_000)))
@pytest.mark.filterwarnings("ignore:adapter_config.json of the adapter. .*matches no adapted")
def test_lists(case: tuple[str, int], tmp_path: Folder) -> None:
    """Thousands of entries for thousands of modules."""
    name, modules = case
    fields: dict[str, Any] = {"target_modules": [f"q{i}" for i in range(10)]} | LISTS[name]
    folder = adapter(tmp_path / "a", many(modules), **fields)
    with bounded():
        try:
            peft.read(folder)
        except ValueError as e:
            assert re.search(ANSWERS + "|matches none of the adapter's tensors", str(e))


@pytest.mark.parametrize("of", ["dots at one place", "dots at many"])
def test_the_most_forms_of_ranks(of: str) -> None:
    """A name is compared as fast with each: whole, however many dots take any character."""
    draw, n = random.Random(0), 940
    ranks = ["a" * i + "." + "a" * (n - 1 - i) for i in range(FORM_LIMIT)]
    names = [f"{i:04}" + "b" * (n - 4) for i in range(400)]
    if of == "dots at many":
        ranks = ["".join(draw.choices("x.", k=80)) for _ in range(FORM_LIMIT)]
        names = [f"{'x.' * 60}{i:04}.q" for i in range(400)]
    fields = {"target_modules": ["q"], "rank_pattern": dict.fromkeys(ranks, 2), "r": 1}
    assert not list_bad_patterns(fields)
    with bounded(2):
        roles = Roles(fields)
        assert {roles[name].rank for name in names} == {1}


def test_a_rank_for_each_expert() -> None:
    """The whole names of 18,432 modules, whose dots take any character."""
    names = [f"layers.{i}.experts.{j}.{x}" for i in range(48) for j in range(128) for x in "abc"]
    ranks = {name: 2 + at % 3 for at, name in enumerate(names)}
    fields = {"target_modules": [*"abc"], "rank_pattern": ranks, "alpha_pattern": ranks}
    with bounded(5):
        roles = Roles(fields)
        assert {name: roles[name].rank for name in names} == ranks


def test_the_longest_pattern() -> None:
    """One character more is refused before it is compiled."""
    longest = "(a|b)" + "c" * (LENGTH - 5)
    assert list_bad_patterns({"rank_pattern": {longest: 2}}) == []
    [problem] = list_bad_patterns({"rank_pattern": {longest + "c": 2}})
    assert problem.where == "rank_pattern" and problem.why.endswith("more than 10000 characters")


def test_parameters_in_every_order(tmp_path: Folder) -> None:
    """Four of six parameters may be a module's in 360 ways, for each of many modules."""
    named = [f"p{i}" for i in range(6)]
    wrapped = (f"m{i}{'.base_layer' * depth}" for i in range(1_000) for depth in range(4))
    tensors = {key: x for module in wrapped for key, x in pair(module, 4, 4, 4).items()}
    folder = write(tmp_path / "a", tensors, target_modules=[], target_parameters=named, r=3)
    with bounded(), pytest.raises(ValueError, match="do not fit"):
        peft.read(folder)


# ------------------------------------------------------------------------------ bases and GGUF

ONE = np.ones((1, 1), np.float32)
EMPTY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


GGUF_CLAIMS = {
    "numbers": struct.pack("<IIQ", 9, 4, 10**12),
    "strings": struct.pack("<IIQ", 9, 8, 10**12),
    "arrays": struct.pack("<IIQ", 9, 9, 10**12),
    "a long string": struct.pack("<IQ", 8, 10**12),
    "nothing": b"",
}


@pytest.mark.parametrize("claim", GGUF_CLAIMS)
@pytest.mark.parametrize("counts", [(0, 1), (0, 10**12), (10**12, 1), (10**12, 0)])
def test_a_gguf_file_claims_much(claim: str, counts: tuple[int, int], tmp_path: Folder) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "a.gguf"
    key = struct.pack("<Q", 1) + b"k" if counts[1] else b""
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + key + GGUF_CLAIMS[claim])
    with bounded(1), refused(ValueError, "", "is not a valid GGUF file: it"):
        peft.load_base(path, {"w": ONE}, [peft.Name("w", "w", "io")])


def of_codes(folder: Folder, count: int, config: Any) -> Folder:
    """A checkpoint of modules with one code and one scale."""
    code, one = ONE.astype(jnp.float8_e4m3fn), ONE[0]
    modules = [f"m{i}.weight" for i in range(count)]
    tensors = dict.fromkeys(modules, code) | dict.fromkeys([f"{m}_scale" for m in modules], one)
    return base(folder, tensors, quantization_config=config)


@pytest.mark.slow
def test_many_modules_in_codes(tmp_path: Folder) -> None:
    folder = of_codes(tmp_path / "b", 12_000, {"quant_method": "fp8"})
    with bounded(8):
        assert len(dequantized(open_checkpoint(folder, copied=True))[1]) == 12_000


def test_groups_of_modules(tmp_path: Folder) -> None:
    """Thousands of them, for thousands of modules."""
    groups = {str(i): {"weights": {"block_structure": [i + 1, 1]}} for i in range(10_000)}
    for count in (1000, 10_000):
        own = dict(list(groups.items())[:count])
        config = {"quant_method": "compressed-tensors", "config_groups": own}
        folder = of_codes(tmp_path / str(count), 1000, config)
        with bounded(3):
            if count == 1000:
                assert len(matrices(folder)) == 1000
            else:
                with refused(ValueError, "path", "expected at most 1000, got 10000"):
                    matrices(folder)


def test_copies_are_read_once(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """400 embeddings and 400 heads: each is read once, not once a pair."""
    tables = {f"m{i}.embed_tokens.weight": np.full((3, 2), i, np.float32) for i in range(400)}
    heads = {f"m{i}.lm_head.weight": np.full((3, 2), i, np.float32) for i in range(400)}
    every, read = tables | heads, list[str]()
    folder = open_checkpoint(base(tmp_path / "b", every, vocab_size=3))

    def digest(_: object, name: str) -> bytes:
        read.append(name)
        return every[name].tobytes()

    monkeypatch.setattr(_ties, "_digest", digest)
    target = Target(folder, next(stored_as_is(folder.shapes)))
    found = Parameters([], wholes(tables))
    _, shared, _ = _ties.find_shared(target, found, {})
    assert shared == {table: [head] for table, head in zip(tables, heads, strict=True)}
    assert sorted(read) == sorted(every)


def test_a_hundred_first_parts() -> None:
    """Of thousands of names, some of which are very long."""
    shapes = {f"p{i % 100}.m{i}.q.weight": (1, 1) for i in range(4_000)}
    shapes |= {"a." * 90 + f"{i}.q.weight": (1, 1) for i in range(90)}
    shapes |= {f"layers.{'9' * 5_000}{i}.block_sparse_moe.q.weight": (1, 1) for i in range(9)}
    wanted = [f"r{i % 100}.m{i}.q.weight" for i in range(4_000)]
    with bounded(3):
        assert list(find(wanted, shapes, {"model_type": "mixtral"}))


def test_many_tables(tmp_path: Folder) -> None:
    tables = {f"m{i}.0.embed_tokens.weight": np.ones((i + 1, 0), np.float32) for i in range(6_000)}
    parts = {f"{i}": {"vocab_size": i + 1, "tie_word_embeddings": i % 2} for i in range(6_000)}
    parts["no"] = {"tie_word_embeddings": False}
    folder = open_checkpoint(base(tmp_path / "b", tables, parts=parts))
    target = Target(folder, next(stored_as_is(folder.shapes)))
    with bounded(4):
        found = Parameters([], wholes(tables))
        assert _ties.find_shared(target, found, {})[1].keys() == tables.keys()


# ------------------------------------------------------------------------------ memory


def largest_config(folder: Folder) -> None:
    (folder / "config.json").write_bytes(b'{"x":[' + b"{}," * 8_388_000 + b"{}]}")


def largest_header(folder: Folder) -> None:
    text = "{" + ",".join(f'"{i:x}":{EMPTY}' for i in range(430_000)) + "}"
    size = len(text).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(size + text.encode())


def largest_index(folder: Folder) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    mapped = {f"{i:0140x}": "model-1.safetensors" for i in range(142_000)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapped}))


@pytest.mark.slow
@pytest.mark.parametrize("largest", [largest_config, largest_header, largest_index])
def test_the_largest_that_is_read(largest: Callable[[Folder], Any], tmp_path: Folder) -> None:
    """What is just below the limits takes 1 GB, and seconds."""
    largest(base(tmp_path / "base", {"q.weight": ONE}))
    adapter(tmp_path / "adapter", ["q"])
    seconds, memory = measure(tmp_path)
    assert seconds < 2 * SECONDS  # of two slow cores; 10 where nothing else runs
    assert memory < 2**30


def test_a_configuration_is_parsed_once(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed, parse = [], _file.parse
    monkeypatch.setattr(_file, "parse", lambda x: parsed.append(x) or parse(x))
    model = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    folder = base(tmp_path / "b", {"q.weight": ONE}, **model)
    peft.export_merged(folder, adapter(tmp_path / "a", ["q"]), tmp_path / "out")
    peft.load_base(folder, {"q": ONE}, [peft.Name("q", "q", "io")])
    quantization = {"quantization_config": {"quant_method": "fp8"}}
    codes = {"q.weight": ONE.astype(jnp.float8_e4m3fn), "q.weight_scale": ONE[0]}
    peft.dequantize_checkpoint(base(tmp_path / "fp8", codes, **quantization), tmp_path / "dense")
    assert sum(b"data_offsets" not in x and b"peft_type" not in x for x in parsed) == 3
