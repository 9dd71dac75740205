"""The zoo of PyTorch's models: the page has what was found, and it is found again."""

import re

import pytest
import zoo_page
from zoo_page import MENDED, PAGE, ROOT, TABLE, Row

ZOOS = {zoo.seed: zoo for zoo in zoo_page.read_all()}
FIRST = min(ZOOS)


def test_the_page_and_the_table_have_what_was_found() -> None:
    """If not, write them again: `python tests/tools/zoo_page.py`."""
    assert PAGE.read_text(encoding="utf-8") == zoo_page.write_page([*ZOOS.values()])
    assert TABLE.read_text(encoding="utf-8") == zoo_page.write_table([*ZOOS.values()])


@pytest.mark.parametrize("seed", ZOOS)
def test_claims(seed: int) -> None:
    """Nothing is wrong without an error, and nearly all is right or refused by name."""
    zoo = ZOOS[seed]
    assert zoo.count("wrong") == 0
    assert zoo.count("whole", "right", "refused") >= 0.97 * len(zoo.rows)
    assert zoo.count("whole") >= 0.92 * len(zoo.rows)


@pytest.mark.parametrize("page", ["README.md", "notebooks/loops/torch.md"])
def test_what_others_say_of_it(page: str) -> None:
    """The numbers of those after which nothing was mended."""
    unseen = [zoo for seed, zoo in ZOOS.items() if seed not in MENDED]
    whole, right, refused = (sum(x.count(v) for x in unseen) for v in ("whole", "right", "refused"))
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
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


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_it_is_found_again() -> None:
    """The same models are drawn, and the same is found of each."""
    for library in ("torchax", "timm", "torchvision"):
        pytest.importorskip(library)
    import zoo

    known = ZOOS[FIRST].rows
    assert list(map(describe, zoo.draw(FIRST))) == list(map(describe, known))


def describe(x: Row) -> tuple[str, str, str]:
    """The model and what its stages come to."""
    return x.family, x.name, x.verdict
