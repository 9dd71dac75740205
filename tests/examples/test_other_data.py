"""`examples/voices.py` and `heat.py`: an adapter learns as well as all parameters do."""

import pathlib

import heat
import pytest
import voices

import jlora

PAGE = pathlib.Path(__file__).parents[2] / "notebooks" / "loops" / "other.md"


@pytest.mark.slow
def test_children_are_learned_and_the_base_knows_the_men(capsys):
    adapter, params, curves = voices.main()
    lora, full = (curve[-1] for curve in curves["children"])
    assert curves["children"][0][0] < 0.4 and lora > max(0.7, full - 0.08)
    assert curves["men"][0][0] > 0.8
    assert jlora.count(adapter) < 0.12 * jlora.count(params)
    check_rows(capsys)


@pytest.mark.slow
def test_eight_graphs_are_enough(capsys):
    """Without the first material it is far off."""
    adapter, params, curves = heat.main()
    lora, full, fresh = (curve[-1] for curve in curves["error"])
    assert lora < min(0.2, 1.2 * full, 0.7 * fresh)
    assert jlora.count(adapter) < 0.1 * jlora.count(params)
    check_rows(capsys)


def check_rows(capsys):
    """The page has who or what was trained, and with how many parameters."""
    for line in capsys.readouterr().out.splitlines():
        assert line.split(" trained")[0] in PAGE.read_text("utf-8"), line
