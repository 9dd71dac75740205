"""Fields of `adapter_config.json` that jlora does not know: refused, unless they are ignored."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from messages import refused
from peft_files import CONFIG, assert_same_files, config_of

from jlora import checkpoint, peft
from jlora._cli._app import cli
from tests.peft.test_links import LIKE, NAMES, folders

Folder = pathlib.Path
FIELD = "use_tomorrow"


def damage(adapter: Folder, **fields: Any) -> Folder:
    """The adapter with more fields."""
    path = adapter / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return adapter


def write_params(folder: Folder) -> Folder:
    checkpoint.export(folder, {"q": {"kernel": np.ones((8, 8), np.float32)}})
    return folder


# Each gets the base, the adapter, the output, and options.
CALLS: dict[str, Callable[..., Any]] = {
    "load": lambda base, a, out, **o: peft.load(a, LIKE, NAMES, **o),
    "read": lambda base, a, out, **o: peft.read(a, **o),
    "export_merged": lambda base, a, out, **o: peft.export_merged(base, a, out, **o),
    "write": lambda base, a, out, **o: peft.write(out, peft.read(a, **o)),
}
LINES = {
    "inspect": "inspect a",
    "merge": "merge base a out",
    "merge into Orbax": "merge params a out --names {rows}",
    "combine": "combine a a out",
    "diff": "diff a a",
    "convert": "convert a out --profile vllm",
    "convert to Orbax": "convert a out --base params --names {rows}",
}


@pytest.mark.parametrize("name", CALLS)
def test_functions(name: str, tmp_path: Folder) -> None:
    """Refused with the way on; with it, the answer is as without the field."""
    base, adapter = folders(tmp_path)
    expected = CALLS[name](base, adapter, tmp_path / "expected")
    damage(adapter, **{FIELD: {"a": 1}}, another=[2])
    with refused(ValueError, "", FIELD, "{'a': 1} is not known", "name the field in `ignore`"):
        CALLS[name](base, adapter, tmp_path / "out")
    with refused(ValueError, "", "another", "[2] is not known") as e:
        CALLS[name](base, adapter, tmp_path / "out", ignore=(FIELD,))
    assert len(e.value.problems) == 1
    assert not (tmp_path / "out").exists()
    found = CALLS[name](base, adapter, tmp_path / "out", ignore=[FIELD, "another", "not there"])
    assert str(found) == str(expected)
    for path in (tmp_path / "expected").glob("*"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", LINES)
def test_commands(name: str, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal names the option."""
    monkeypatch.chdir(tmp_path)
    folders(tmp_path)[1].rename("a")
    write_params(tmp_path / "params")
    (tmp_path / "rows.py").write_text(
        "from jlora import peft\nROWS = [peft.Name('q/kernel', 'q', 'io')]\n"
    )
    damage(tmp_path / "a", **{FIELD: True})
    words = LINES[name].format(rows="rows.py:ROWS").split()
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2
    assert result.stderr.endswith("If it does not, name the field in --ignore.\n")
    assert not (tmp_path / "out").exists()
    found = CliRunner().invoke(cli, [*words, "--ignore", FIELD])
    assert found.exit_code == 0, found.output


def test_an_engine_without_the_field(tmp_path: Folder) -> None:
    adapter = damage(folders(tmp_path)[1], **{FIELD: 1})
    [finding] = peft.check(adapter, "vllm").findings
    assert finding.what == FIELD
    assert not peft.check(adapter, "vllm", ignore=(FIELD,)).findings
    words = ["check", str(adapter), "--for", "vllm", "--ignore", FIELD]
    assert CliRunner().invoke(cli, words).exit_code == 0


def test_what_is_read_and_saved_again(tmp_path: Folder) -> None:
    """`save` takes no field either that `load` would refuse; `read` leaves it out."""
    adapter = folders(tmp_path)[1]
    tree = peft.load(adapter, LIKE, NAMES)
    peft.save(tmp_path / "expected", LIKE, tree, NAMES, config=config_of(adapter))
    damage(adapter, **{FIELD: 1})
    with refused(ValueError, "config", FIELD, "1 is not known", "leave the field out"):
        peft.save(tmp_path / "b", LIKE, tree, NAMES, config=config_of(adapter))
    config = peft.read(adapter, ignore={FIELD}).config
    peft.save(tmp_path / "b", LIKE, tree, NAMES, config=config)
    assert_same_files(tmp_path / "b", tmp_path / "expected")


@pytest.mark.parametrize(
    "known", ["r", "use_dora", "layer_replication", "peft_type", "token_indices"]
)
def test_known_fields_are_not_ignored(known: str, tmp_path: Folder) -> None:
    """Neither those that jlora reads, nor those that it refuses."""
    adapter = folders(tmp_path)[1]
    with refused(ValueError, "ignore", f"but it knows {known}: without"):
        peft.read(adapter, ignore=("x", known))
    found = CliRunner().invoke(cli, ["inspect", str(adapter), "--ignore", known])
    assert found.exit_code == 2
    assert found.stderr.startswith("jlora: --ignore is for fields that jlora does not know")


def test_one_name_is_a_tuple_too(tmp_path: Folder) -> None:
    adapter = folders(tmp_path)[1]
    with refused(TypeError, "ignore", "must be a tuple of names", "such as ('x',)"):
        peft.read(adapter, ignore="x")
