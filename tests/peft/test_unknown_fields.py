"""Fields of `adapter_config.json` that jlora does not know: refused, unless they are ignored."""

import json
import shutil
from typing import Any

import pytest
from messages import refused
from peft_calls import ADAPTERS, LIKE, NAMES, folders
from peft_files import CONFIG, Folder, assert_same_files, bytes_of, config_of

from jlora import peft
from tests.cli.test_cli import fails, run

FIELD = "use_tomorrow"


def damage(adapter: Folder, **fields: Any) -> Folder:
    """The adapter with more fields."""
    path = adapter / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return adapter


@pytest.mark.parametrize("name", [x for x in ADAPTERS if "check" not in x])
def test_unknown_fields(name: str, tmp_path: Folder) -> None:
    """Refused with the way on; with it, the answer is as without the field."""
    call, (base, adapter), out = ADAPTERS[name], folders(tmp_path), tmp_path / "out"
    expected = call(base, adapter, out)
    before = bytes_of(out)
    if out.exists():
        shutil.rmtree(out)
    damage(adapter, **{FIELD: {"a": 1}}, another=[2])
    option = "--ignore" if "jlora" in name else "`ignore`"
    with refused(ValueError, "", FIELD, "{'a': 1} is not known", f"name the field in {option}"):
        call(base, adapter, out)
    with refused(ValueError, "", "another", "[2] is not known"):
        call(base, adapter, out, FIELD)
    assert not out.exists()
    assert str(call(base, adapter, out, FIELD, "another", "not there")) == str(expected)
    if "params" not in name:  # what Orbax writes is never the same
        assert bytes_of(out) == before


def test_an_engine_without_the_field(tmp_path: Folder) -> None:
    adapter = damage(folders(tmp_path)[1], **{FIELD: 1})
    [finding] = peft.check(adapter, "vllm").findings
    assert finding.what == FIELD
    assert not peft.check(adapter, "vllm", ignore=(FIELD,)).findings
    run("check", adapter, "--for", "vllm", "--ignore", FIELD)


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


@pytest.mark.parametrize("known", ["r", "use_dora", "layer_replication", "peft_type"])
def test_known_fields_are_not_ignored(known: str, tmp_path: Folder) -> None:
    """Neither those that jlora reads, nor those that it refuses."""
    adapter = folders(tmp_path)[1]
    with refused(ValueError, "ignore", f"but it knows {known}: without"):
        peft.read(adapter, ignore=("x", known))
    said = fails("inspect", adapter, "--ignore", known)
    assert said.startswith("jlora: --ignore is for fields that jlora does not know")


def test_one_name_is_a_tuple_too(tmp_path: Folder) -> None:
    adapter = folders(tmp_path)[1]
    with refused(TypeError, "ignore", "must be a tuple of names", "such as ('x',)"):
        peft.read(adapter, ignore="x")
