"""Errors as data: what programs read of them, and the text that is made of it."""

import copy
import pickle

import pytest
from peft_files import Files, Folder

import jlora
from jlora import LoRA
from jlora._errors import (
    MOST,
    InputError,
    MissingError,
    OccupiedError,
    Problem,
    WritingError,
    not_written,
)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (InputError, ValueError),
        (MissingError, FileNotFoundError),
        (OccupiedError, FileExistsError),
        (WritingError, OSError),
    ],
)
def test_errors_are_those_of_python(kind: type[InputError], builtin: type[Exception]) -> None:
    """They keep their fields when they go to another process, or are copied."""
    problems = [Problem("a.b", "missing"), Problem("c", "is odd", "Correct it.")]
    error = kind("path", "/x is odd.", path="/x", problems=problems, remedy="Give another.")
    for same in (error, pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert isinstance(same, builtin)
        assert (same.argument, same.path, same.problems) == ("path", "/x", tuple(problems))
        assert str(same) == (
            "`path`: /x is odd. 2 problems:\n  a.b: missing\n  c: is odd. Correct it.\n"
            "Give another."
        )


def test_an_error_of_the_system_keeps_its_number() -> None:
    error = not_written("out", "/x", "No space left on device", 28)
    assert (error.errno, isinstance(error, WritingError)) == (28, True)


def test_what_many_problems_share_is_said_once() -> None:
    """A remedy of several problems is below all; of very many problems, the first are listed."""
    problems = [Problem(f"m{i}", "is lost", "Use the other table.") for i in range(MOST + 5)]
    text = str(InputError("base", "has no such leaves.", problems=problems))
    assert text.count("Use the other table.") == 1
    assert text.splitlines()[1] == "  m0: is lost"
    assert text.splitlines()[-2:] == ["  … and 5 more", "Use the other table."]


def test_what_a_stranger_wrote_does_not_garble_the_text() -> None:
    where = Problem("a\0b\u202e" + "c" * 1000, "is odd")
    assert str(where).isprintable() and len(str(where)) < 200


def test_arguments_have_other_names_elsewhere() -> None:
    """A path is written once, and not where the error has it."""
    problems = [Problem("q", "is not in `base`", "Give `follow_links=True`.")]
    error = InputError("path", "/a/b fits neither `base` nor `other`.", path="/a/b")
    names, paths = {"path": "DIR", "base": "--base"}, {"path": "/a/b", "base": "/c"}
    assert error.text(names, paths) == "DIR: /a/b fits neither --base nor `other`."
    error = InputError("path", "does not fit `base`.", problems=problems)
    assert error.text(names | {"follow_links": "--follow-links"}, paths) == (
        "DIR /a/b does not fit --base. 1 problem:\n  q: is not in --base. Give --follow-links."
    )


def test_programs_read_the_fields(tmp_path: Folder) -> None:
    """Of a rule, of a file, and of an adapter with several problems."""
    with pytest.raises(jlora.types.InputError) as of_rule:
        LoRA("w", rank=0)
    assert (of_rule.value.argument, of_rule.value.path) == ("rank", None)
    files = Files(tmp_path)
    with pytest.raises(jlora.types.InputError) as of_table:
        jlora.peft.load(files.folder, files.case.base, jlora.peft.TABLES["llama"])
    found = of_table.value
    assert (found.argument, found.path) == ("path", str(files.folder))
    assert found.problems and all(x.remedy.startswith("`names` is") for x in found.problems)
    (files.folder / "adapter_config.json").write_text("{")
    with pytest.raises(jlora.types.InputError) as of_file:
        files.load()
    assert (of_file.value.argument, of_file.value.path) == ("path", "adapter_config.json")
