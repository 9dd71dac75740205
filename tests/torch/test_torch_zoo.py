"""The zoo of PyTorch's models: the page has what was found, and it is found again."""

import re

import pytest
import zoo_page
from zoo_page import MENDED, PAGE, ROOT, TABLE

ZOOS = {zoo.seed: zoo for zoo in zoo_page.read_all()}
FIRST = min(ZOOS)


def test_the_page_and_the_table_have_what_was_found() -> None:
    """If not, write them again: `python tests/tools/zoo_page.py`."""
    assert PAGE.read_text(encoding="utf-8") == zoo_page.write_page([*ZOOS.values()])
    assert TABLE.read_text(encoding="utf-8") == zoo_page.write_table([*ZOOS.values()])


@pytest.mark.parametrize("seed", ZOOS)
def test_claims(seed: int) -> None:
    """Nothing is wrong without an error, and nearly all is right or refused by name.

    Nearly all is whole, where PEFT does not fail itself.
    """
    zoo = ZOOS[seed]
    assert zoo.count("wrong") == 0
    assert zoo.count("whole", "right", "refused") >= 0.97 * len(zoo.rows)
    assert zoo.count("whole") >= 0.92 * sum("PEFT fails" not in x.stages for x in zoo.rows)


def test_what_the_readme_says_of_it() -> None:
    """The numbers of those after which nothing was mended."""
    unseen = [zoo for seed, zoo in ZOOS.items() if seed not in MENDED]
    whole, right, refused = (sum(x.count(v) for x in unseen) for v in ("whole", "right", "refused"))
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    said = r"Of (\d+) models drawn at random, (\d+) compute .*?, (\d+) are refused .*?\. (\d+) also"
    numbers = sum(len(x.rows) for x in unseen), whole + right, refused, whole
    assert re.findall(said, text) == [tuple(map(str, numbers))]


def test_the_first_is_large() -> None:
    """No class twice, and all families."""
    every = [(x.family, x.name) for zoo in ZOOS.values() for x in zoo.rows]
    assert len({*every}) == len(every)
    assert len(ZOOS[FIRST].rows) >= 120
    assert len({x.family for x in ZOOS[FIRST].rows}) == 12


def test_what_is_refused_has_a_remedy() -> None:
    """A sentence that says what is wrong, and one that says what to do."""
    for x in (x for zoo in ZOOS.values() for x in zoo.rows if "refused" in x.stages):
        assert len(re.findall(r"\.( |$)", x.why)) > 1, x


JUDGED = [
    ("plain modules", "GRU", "whole"),
    ("experts", "MixtralForCausalLM", "whole"),
    ("encoders and decoders", "FSMTForConditionalGeneration", "refused"),  # PyTorch reads lengths
    ("encoders", "FlaubertModel", "refused"),
]


@pytest.mark.slow
def test_the_same_models_are_drawn() -> None:
    """In the order of the record, which lacks those with which PyTorch computes nothing."""
    for library in ("jlora.torch._apply", "timm", "torchvision"):
        pytest.importorskip(library)
    from zoo_families import list_drawn

    known = ZOOS[FIRST].rows
    drawn = [(family, name) for family, names in list_drawn(FIRST) for name in names]
    recorded = [(x.family, x.name) for x in known]
    assert [x for x in drawn if x in recorded] == recorded


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("family", "name", "verdict"), JUDGED)
def test_the_judge(family: str, name: str, verdict: str) -> None:
    """It judges models of today by today's rules, which are not those of all records."""
    for library in ("jlora.torch._apply", "timm", "torchvision"):
        pytest.importorskip(library)
    import zoo

    row = zoo.measure(family, name)
    assert row is not None
    assert row.verdict == verdict, row
