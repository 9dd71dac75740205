"""`examples/resume.py` on one layer; faults, with real processes, are in another file."""

import pytest
import resume
from peft_files import assert_equal

from jlora import checkpoint


def once(make):
    """What the first call of `make` gives, in every call: a program is compiled once."""
    made = []
    return lambda *args: made[0] if made else made.append(make(*args)) or made[0]


SMALL = "--layers=1 --length=8 --batch=4 --sentences=20 --rank=2 --save-every=3 --resume"


def test_a_run_that_goes_on_is_one_that_was_never_stopped(tmp_path, monkeypatch):
    """Over an epoch's end, and after half a line in its log; only with the same settings."""
    for name in ("load", "make_step"):
        monkeypatch.setattr(resume, name, once(getattr(resume, name)))

    def train(name, *more):
        return resume.train(resume.parse([f"--out={tmp_path / name}", *SMALL.split(), *more]))

    whole, other = tmp_path / "whole", tmp_path / "other"
    assert train("whole", "--steps=7") == 7 and train("other", "--steps=4") == 4
    with (other / "losses.txt").open("a") as log:
        log.write("5 0x1p-1\n6 0x1")
    with pytest.raises(ValueError, match=r"cannot resume from .*: seed was 0, is 1"):
        train("other", "--steps=7", "--seed=1")
    assert train("other", "--steps=7") == 7
    log = (other / "losses.txt").read_text()
    assert log == (whole / "losses.txt").read_text() and log.count("\n") == 7
    assert_equal(*(checkpoint.restore(x / "checkpoints" / "7") for x in (whole, other)))
