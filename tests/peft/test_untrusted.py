"""Hostile folders cause nothing but an answer or an error, in text that does no harm."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import untrusted_worker
from untrusted_worker import FOLDERS

WORKER = pathlib.Path(untrusted_worker.__file__)


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """What the worker found, in a process that an audit hook belongs to."""
    done = subprocess.run([sys.executable, str(WORKER)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_the_hook_sees(answers: Any) -> None:
    seen = " ".join(answers["the hook itself"]["events"])
    assert all(what in seen for what in ("subprocess.Popen", "open of", "import of tabnanny"))


@pytest.mark.parametrize("case", FOLDERS)
def test_nothing_else_happens(case: str, answers: Any) -> None:
    """No new module, no connection, no process, no file outside of the folder.

    Names are printed harmlessly.
    """
    assert answers[case]["events"] == []
    said = answers[case]["messages"]
    assert len(said) > 3
    assert [x for x in said if not x[1].replace("\n", "").isprintable()] == []
