"""What errors say: the facts in their fields, and their texts, which stand in `messages.txt`.

The file has one text for each place that writes one, with the first test that provokes it. That
test says it to the letter. Of texts of other tests each line is held to the words of some line of
the file: names and numbers in it are facts, which tests name themselves.
"""

import collections
import contextlib
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest

FILE = pathlib.Path(__file__).parent / "messages.txt"
HOW = "if this is right, run it with --rewrite-messages"
HEAD = "# What tests expect of texts. `pytest --rewrite-messages` writes it; read the difference."
# What differs between machines, runs and versions, and what is written for it.
VARYING = {
    r"\n-+\nFor simplicity, JAX has removed .*": "",
    r"[^\s'\"=(]*/pytest-of-[^/]+/pytest-\d+(/popen-gw\d+)?/[^/\s'\".:;,)]+": "TMP",
    re.escape(f"{FILE.parents[2]}/"): "",
    r"[^\s'\"(]*/site-packages/": "",
    r"(\.py):\d+": r"\1:LINE",
    r"\bjlora \d+\.\d+\.\w+": "jlora VERSION",
    r"\bat 0x[0-9a-f]+": "at 0x…",
    r"\bhash [0-9a-f]{16}, got [0-9a-f]{16}\b": "hash H, got ANOTHER",  # of codes: as a CPU rounds
    r'NOT_FOUND: Error .*?"\)': "NOT_FOUND: …)",  # TensorStore's, of any of many files
}
QUOTED = re.compile(r"'[^'\n]*'|`[^`\n]*`|\"[^\"\n]*\"|\([^()\n]*\)")
VALUE = re.compile(r"(?=\S*([\d_/=\[\](){}<>\\×→·]|\w\.\w))\S*[^\s.,:;]")
LISTED = re.compile(r"…,? (?:and |or |× )?…|…[…\[\]()]+")
said: dict[str, list[str]] = {}  # by the running test


def read(text: str) -> dict[str, list[str]]:
    """The texts of each test, of what `form` made of them."""
    found, texts = dict[str, list[str]](), list[str]()
    for line in text.removesuffix("\n").split("\n")[1:]:
        if line and not line.startswith(" "):
            texts = found[line] = []
        elif line.startswith("  -"):
            texts.append(line[4:])
        else:
            texts[-1] += "\n" + line[4:]
    return found


def list_wordings(text: str) -> set[str]:
    """The lines of a text, with `…` for what depends on the arguments.

    Examples:
        >>> list_wordings("`rank` of LoRA('w') must be at least 1; got 0.")
        {'… of LoRA… must be at least …; got ….'}
    """
    return {_word(line) for line in text.split("\n")}


def _word(line: str) -> str:
    line, before = VALUE.sub("…", QUOTED.sub("…", line.strip())), ""
    while line != before:  # lists of values, and the place at the start
        line, before = re.sub(r"^(…|\w+): ", "", LISTED.sub("…", line)), line
    return line


def choose(texts: Mapping[str, list[str]], others: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Chooses what the file has of some tests' texts: those with a wording that no other has."""
    known = {x for kept in others.values() for text in kept for x in list_wordings(text)}
    chosen = collections.defaultdict[str, list[str]](list)
    for test, said_by_it in sorted(texts.items()):
        for text in said_by_it:
            if not list_wordings(text) <= known:
                known |= list_wordings(text)
                chosen[test].append(text)
    return dict(chosen)


def form(found: Mapping[str, list[str]]) -> str:
    """Makes the text of the file: tests by name, each with its texts in their order."""
    lines = [HEAD]
    for test, texts in sorted(found.items()):
        lines += [test, *("  - " + text.replace("\n", "\n    ") for text in texts)]
    return "\n".join(line.rstrip() for line in "\n".join(lines).split("\n")) + "\n"


def write(found: Mapping[str, list[str]]) -> None:
    """Writes the file, whole or not at all: each of several processes may."""
    part = FILE.with_suffix(f".{os.getpid()}")
    part.write_text(form(found), encoding="utf-8")
    part.replace(FILE)


def find_stale(found: Iterable[str], collected: Iterable[str]) -> list[str]:
    """Texts of tests that are not among those of their file any more."""
    tests = set(collected)
    files = {test.partition("::")[0] for test in tests}
    # A key may have the id of one of several parameters.
    ids = collections.defaultdict[str, str](str)
    for test in tests:
        name, _, each = test.partition("[")
        ids[name] += f"-{each[:-1]}-"

    def is_stale(key: str) -> bool:
        file, (name, _, case) = key.partition("::")[0], key.partition("[")
        if file not in files:
            return not (FILE.parents[2] / file).exists()
        return key not in tests and (not case or f"-{case[:-1]}-" not in ids[name])

    return [key for key in found if is_stale(key)]


EXPECTED, STALE = read(FILE.read_text(encoding="utf-8")), pytest.StashKey[list[str]]()
WORDINGS = {x for texts in EXPECTED.values() for text in texts for x in list_wordings(text)}
is_rewriting = False


def check_text(text: str, case: str = "") -> None:
    """Compares a text with those in the file.

    Args:
        text: it may have paths of the test and lines of code, which are not compared.
        case: the id of the parameter that changes the text, if others do not.
    """
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" (")[0]
    key = f"{test.partition('[')[0]}[{case}]" if case else test
    for pattern, better in VARYING.items():
        text = re.sub(pattern, better, text)
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    said.setdefault(key, []).append(text)
    new = list_wordings(text) - WORDINGS
    if new and not is_rewriting:
        has = "\n".join(EXPECTED.get(key, []))
        pytest.fail(f"{FILE.name} has of this test\n{has}\nthe test says\n{text}\n{HOW}")


def check_all_said(test: str) -> None:
    """Raises if the file has a text of a test that it did not say."""
    for key in {test, *said} & EXPECTED.keys():
        gone = [text for text in EXPECTED[key] if text not in said.get(key, [])]
        if gone and not is_rewriting:
            has, says = "\n".join(gone), "\n".join(said.get(key, []))
            pytest.fail(f"{FILE.name} has of {key}\n{has}\nthe test says\n{says}\n{HOW}")


def check_facts(error: Exception, argument: str, *facts: object) -> None:
    """Looks for facts in the fields of an error; in its text if it has no fields."""
    fields: Any = error
    whole, parts = str(error), [("", "", "")]
    if hasattr(error, "problems"):
        assert argument in ("", fields.argument), fields.argument
        whole = f"{fields.sentence}\n{fields.remedy}"
        parts = [(fields.path, "", ""), *fields.problems]
    assert not argument or f"`{argument}`" in str(error), error
    assert any(
        all(str(x) == where or str(x) in f"{why}\n{remedy}\n{whole}" for x in facts)
        for where, why, remedy in parts
    ), (facts, whole, parts)


@contextlib.contextmanager
def refused(
    error: Any, argument: str = "", *facts: object, case: str = ""
) -> Iterator[pytest.ExceptionInfo[Any]]:
    """Expects an error with these facts, and its text as in the file.

    Args:
        error: its class, or several.
        argument: the argument that it names.
        facts: what it says with one of its problems: the path or the place as a whole, and parts
            of what was got and of the remedy.
        case: as for `check_text`.
    """
    with pytest.raises(error) as caught:
        yield caught
    check_facts(caught.value, argument, *facts)
    check_text(str(caught.value), case)


def each_refusal(table: Mapping[Any, Mapping[str, Any]]) -> Any:
    """Parametrizes by (error, call, facts) over a table of calls, by error and then by facts.

    These are written as the message with `...` where it is left out, first the argument if there
    is one: "`rank` ... got 0.".
    """
    cases = []
    for error, calls in table.items():
        for key, call in calls.items():
            facts = key.split(" ... ")
            named = re.fullmatch(r"`(\w+)`", facts[0])
            facts = (named[1], *facts[1:]) if named else ("", *facts)
            cases.append(pytest.param(error, call, facts, id=key))
    return pytest.mark.parametrize(("error", "call", "facts"), cases)


def all_refused(
    table: Mapping[Any, Mapping[str, Any]], provoke: Callable[[Any], Any] = lambda call: call()
) -> Callable[..., None]:
    """Makes a test of each call of a table, as in `each_refusal`; `provoke` gets the call."""

    @each_refusal(table)
    def test(error: Any, call: Any, facts: Any) -> None:
        with refused(error, *facts):
            provoke(call)

    return test
