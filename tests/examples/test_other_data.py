"""`examples/digits.py`, `voices.py` and `heat.py`: adapters learn as well as all parameters do."""

import pathlib

import digits
import heat
import pytest
import voices

import jlora

PAGE = pathlib.Path(__file__).parents[2] / "notebooks" / "loops" / "other.md"
pytestmark = pytest.mark.slow


def last(curves):
    return [curve[-1] for curve in curves]


def check_digits(curves):
    for lora, full in curves.values():
        assert lora[0] == full[0] < 0.3 and lora[-1] > max(0.65, full[-1] - 0.1)


def check_voices(curves):
    """The base knows the men."""
    lora, full = last(curves["children"])
    assert curves["children"][0][0] < 0.4 and lora > max(0.7, full - 0.08)
    assert curves["men"][0][0] > 0.8


def check_heat(curves):
    """Without the first material it is far off."""
    lora, full, fresh = last(curves["error"])
    assert lora < min(0.2, 1.2 * full, 0.7 * fresh)


EXAMPLES = {digits: check_digits, voices: check_voices, heat: check_heat}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda x: x.__name__)
def test_what_the_page_says_of_it(example, capsys):
    """It trains as many parameters, a tenth of all."""
    adapter, params, curves = example.main()
    EXAMPLES[example](curves)
    assert jlora.count(adapter) < 0.12 * jlora.count(params)
    for line in capsys.readouterr().out.splitlines():
        assert line.split(" trained")[0] in PAGE.read_text("utf-8"), line
