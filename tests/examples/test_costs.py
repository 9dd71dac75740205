"""`examples/costs.py`: the frozen step costs least, the full one most."""

import json
import re

import costs
import pytest


def report(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[dict, list[list[str]]]:
    """What the example prints: the line to report, and the rows of the table."""
    costs.main(args)
    *table, line = capsys.readouterr().out.splitlines()
    return json.loads(line), [re.split(r"  +", row.strip()) for row in table]


@pytest.mark.slow
def test_times(monkeypatch, capsys):
    """Of a tiny model, in two rounds."""
    monkeypatch.setattr(costs, "ROUNDS", 2)
    monkeypatch.setattr(costs, "VOCABULARY", 64)
    found, table = report(capsys, "--sizes", "64,2,2,16", "--rank", "2")
    assert table[0] == ["tokens/s", "GB of memory"]
    assert [row[0] for row in table[1:]] == [*costs.STEPS, "LoRA / frozen", "full / frozen"]
    assert (found["device"], found["dim"], found["rank"]) == ("cpu", 64, 2)
    frozen, lora, full = (found["steps"][name]["GB of memory"] for name in costs.STEPS)
    assert frozen <= lora <= full
    assert all(row["tokens/s"] > 0 for row in found["steps"].values())
