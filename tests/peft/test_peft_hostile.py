"""PEFT's files from strangers: whatever they say, an answer or an error comes with bounded work."""

import itertools
import json
import random
import re
import struct
import subprocess
import sys
import time
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
from jlora.peft._problems import Problems
from jlora.peft.adapter import _patterns
from jlora.peft.adapter._parts import Parameters
from jlora.peft.adapter._patterns import Clock, Job, match
from jlora.peft.adapter._roles import list_bad_patterns, list_parents, list_unused, resolve
from jlora.peft.formats._dequantize import dequantized, matrices
from jlora.peft.merge import _ties
from jlora.peft.merge._target import Target
from jlora.peft.places._find import find, stored_as_is
from tests.peft.merge.test_peft_merged import checkpoint as base


def adapter(folder: Folder, modules: Sequence[str], rank: int = 1, **fields: Any) -> Folder:
    """PEFT's files for modules with one input and one output."""
    tensors = {key: x for module in modules for key, x in pair(module, rank).items()}
    return write(folder, tensors, **{"r": rank} | fields)


# What takes Python's matcher 2^n steps, or n^5, or n^3 states.
N = 28
NAME = "a" * N + ".q"
PATTERNS = {
    "same twice": "(a|a)*!",
    "verbose": "(?x)(a+) #c\n+!",
    "five stars": ".*a.*a.*a.*a.*!",
    "counted thrice": "a{0,5000}a{0,5000}a{0,5000}!",
    "nested": "(a+)+!",
    "wide": "(x+x+)+y|" + "(a*)*" * 20 + "!",
}
FIELDS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern")
TOO_MUCH = "takes more than (1|5) seconds of CPU time or 512 MB"
ANSWERS = (
    TOO_MUCH + "|does not select it"
    "|is not a regular expression|matches no module"
    "|target_parameters: expected names of at most 100"
)


@pytest.mark.parametrize(
    "case", some(itertools.product(FIELDS, PATTERNS), ("target_modules", "nested"))
)
@pytest.mark.filterwarnings("ignore:adapter_config.json of the adapter. .*matches no adapted")
def test_patterns(case: tuple[str, str], tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read, or refused, with bounded work."""
    monkeypatch.setattr(_patterns, "SECONDS", 1.0)
    field, text = case[0], PATTERNS[case[1]]
    fields: dict[str, Any] = {field: {text: 1} if field in FIELDS[2:4] else text}
    modules = [NAME, *(f"{'a' * 900}.{i}.q" for i in range(20))]
    folder = adapter(tmp_path / "a", modules, layers_to_transform=[0], **fields)
    with bounded():
        try:
            peft.read(folder)
        except ValueError as e:
            assert re.search(TOO_MUCH if field in FIELDS[:2] else ANSWERS, str(e))
            assert str(e).startswith("`path`: ")


ANY = r"(?i:[\0-\uffff])"  # which Python compiles for seconds, or minutes
UNCOMPILED: dict[str, dict[str, Any]] = {
    "one": {"target_modules": ANY * 500},
    "many": {"rank_pattern": {ANY * 50 + f"{i}": 1 for i in range(900)}},
}


@pytest.mark.parametrize("case", some(UNCOMPILED, "many"))
def test_patterns_take_long_to_compile(
    case: str, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_patterns, "SECONDS", 1.0)
    with bounded(4), refused(ValueError, "", "takes more than 1 seconds of CPU time or 512 MB"):
        peft.read(adapter(tmp_path / "a", ["a.q"], **UNCOMPILED[case]))


@pytest.mark.slow
def test_answers_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process has the answers to one pattern at a time."""
    child = _patterns._CHILD.replace('("AS", 2**29)', '("AS", 2**26)')
    assert child != _patterns._CHILD
    monkeypatch.setattr(_patterns, "_CHILD", child)
    jobs, names = (
        [Job("target_modules", f"q{i}|x*y") for i in range(100)],
        [f"q{i}" for i in range(50_000)],
    )
    found = match(jobs, names, Clock())
    assert [[*found[job]] for job in jobs] == [[name] for name in names[:100]]


def test_too_many_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 5 seconds there are answers of gigabytes."""
    monkeypatch.setattr(_patterns.subprocess, "run", None)
    jobs = [Job("rank_pattern", f"z{i}|y*z") for i in range(10_000)]
    with refused(ValueError, "config", "512 MB"):
        match(jobs, [f"q{i}" for i in range(2_001)], Clock())


def test_a_busy_machine_refuses_nothing(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that runs a thousand times as fast changes no answer."""
    start, clock = time.monotonic(), time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: start + 1000 * (clock() - start))
    folder = adapter(tmp_path / "a", many(200), target_modules=r".*\.q\d")
    assert len(peft.read(folder).leaves) == 200


@pytest.mark.parametrize(
    ("fields", "processes"),
    [
        ({"target_modules": [f"q{i}" for i in range(10)]}, 0),
        ({"rank_pattern": {"a.b": 2, r"layers\.0\.block\.q1": 1, "x-y_z": 3}}, 0),
        ({"layers_to_transform": list(range(99)), "layers_pattern": ["layers", "h"]}, 2),
        ({"target_modules": r".*\.q\d", "rank_pattern": {r"x\d": 2}}, 2),
        ({"target_modules": [], "target_parameters": ["w"], "rank_pattern": {r"x\d": 2}}, 3),
    ],
)
@pytest.mark.filterwarnings("ignore:adapter_config.json of the adapter. ")
def test_names_need_no_process(
    fields: dict[str, Any], processes: int, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patterns are matched with all names at once, however many modules the base has."""
    started, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: started.append(a) or run(*a, **k))
    fields = {"target_modules": [f"q{i}" for i in range(10)]} | fields
    own = many(100)
    folder = adapter(tmp_path / "a", own, **fields)
    peft.read(folder)
    assert len(started) <= processes
    if processes and fields["target_modules"]:
        weights = {f"{module}.weight": ONE for module in own}
        started.clear()
        peft.export_merged(base(tmp_path / "b", weights), folder, tmp_path / "out")
        assert len(started) <= 2 * processes


def test_no_process_can_be_started(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    folder = adapter(tmp_path / "a", many(2), target_modules=r".*\.q\d")
    with refused(ValueError, "", "but Python could not be started (", "). List"):
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
    [found] = match([Job("target_modules", pattern)], names, Clock()).values()
    assert found.keys() == {name for name in names if re.fullmatch(pattern, name)}


def looked_up(patterns: dict[str, int], key: str) -> int:
    """As PEFT does: `get_pattern_key`."""
    matching = (p for p in patterns if re.match(rf"(.*\.)?({p})$", key))
    return patterns.get(next(matching, ""), 7)


@hypothesis.given(st.dictionaries(SEARCHED, st.integers(1, 9), max_size=6), st.lists(NAMES))
@hypothesis.settings(max_examples=10, deadline=None)
def test_ranks_are_looked_up_as_peft_does(patterns: dict[str, int], names: list[str]) -> None:
    patterns = {p: rank for p, rank in patterns.items() if p not in ("", "(?i)AQ")}
    fields = {"target_modules": ["q"], "rank_pattern": patterns, "r": 7}
    for name, role in resolve(fields, names, Clock()).items():
        assert role.rank == looked_up(patterns, name)
    idle = [p for p in patterns if not any(re.match(rf"(.*\.)?({p})$", n) for n in names)]
    assert list_unused(fields, names, (), None, "it", Clock()) == [
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
    for name, role in resolve(fields, names, Clock()).items():
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
    assert list_unused(fields, (), names, names, "it", Clock()) == [
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


def test_ranks_of_every_form(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain patterns are compared with names of their length alone, place by place, and timed."""
    monkeypatch.setattr(_patterns, "SECONDS", 0.05)
    names, draw = [f"{'x.' * 60}{i:04}.q" for i in range(200)], random.Random(0)
    ranks = {"".join(draw.choices("x.", k=80)): 1 for _ in range(400)}
    folder = adapter(tmp_path / "a", names, rank_pattern=ranks)
    with bounded(), refused(ValueError, "", "takes more than 0.05 seconds"):
        peft.read(folder)


def test_long_ranks() -> None:
    """A long name is compared as fast with patterns that take any character at one place."""
    n = 940
    ranks = {"a" * i + "." + "a" * (n - 1 - i): 2 for i in range(n)}
    fields = {"target_modules": ["q"], "rank_pattern": ranks, "r": 1}
    with bounded(2):
        found = resolve(fields, [f"{i:04}" + "b" * (n - 4) for i in range(400)], Clock())
    assert {role.rank for role in found.values()} == {1}


def test_a_rank_for_each_expert() -> None:
    """The whole names of 18,432 modules, whose dots take any character."""
    names = [f"layers.{i}.experts.{j}.{x}" for i in range(48) for j in range(128) for x in "abc"]
    ranks = {name: 2 + at % 3 for at, name in enumerate(names)}
    fields = {"target_modules": [*"abc"], "rank_pattern": ranks, "alpha_pattern": ranks}
    with bounded(_patterns.SECONDS):
        found = resolve(fields, names, Clock())
    assert {name: role.rank for name, role in found.items()} == ranks


def test_the_longest_pattern() -> None:
    """One character more is refused before it is compiled."""
    longest = "(a|b)" + "c" * (_patterns.LENGTH - 5)
    assert list_bad_patterns({"rank_pattern": {longest: 2}}) == ()
    [problem] = list_bad_patterns({"rank_pattern": {longest + "c": 2}})
    assert problem.where == "rank_pattern" and problem.why.endswith("more than 10000 characters")


def test_parameters_in_every_order(tmp_path: Folder) -> None:
    """Six parameters a module can be told apart in 720 ways, for each of many modules."""
    named = [f"p{i}" for i in range(6)]
    wrapped = (f"m{i}{'.base_layer' * depth}" for i in range(250) for depth in range(6))
    tensors = {key: x for module in wrapped for key, x in pair(module, 4, 4, 4).items()}
    folder = write(tmp_path / "a", tensors, target_modules=[], target_parameters=named, r=3)
    with bounded(), pytest.raises(ValueError, match=r"do not fit|takes more than"):
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
        peft.load_base(path, [peft.Name("w", "w", "io")], like={"w": ONE})


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
    found = Parameters([], dict(tables), {}, {}, {})
    shared = _ties.find_shared(target, found, Problems("", ""))
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
        found = Parameters([], dict(tables), {}, {}, {})
        assert _ties.find_shared(target, found, Problems("", "")).keys() == tables.keys()


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
    peft.load_base(folder, [peft.Name("q", "q", "io")], like={"q": ONE})
    quantization = {"quantization_config": {"quant_method": "fp8"}}
    codes = {"q.weight": ONE.astype(jnp.float8_e4m3fn), "q.weight_scale": ONE[0]}
    peft.dequantize_checkpoint(base(tmp_path / "fp8", codes, **quantization), tmp_path / "dense")
    assert sum(b"data_offsets" not in x and b"peft_type" not in x for x in parsed) == 3
