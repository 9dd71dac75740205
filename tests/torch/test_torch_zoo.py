"""The zoo of PyTorch's models: the page has what was found, and it is found again."""

import re

import pytest
import zoo_page
from zoo_page import PAGE, ROOT, Row

ZOOS = {zoo.seed: zoo for zoo in zoo_page.read_all()}
FIRST = min(ZOOS)


def test_the_page_has_what_was_found() -> None:
    """If not, write it again: `python tests/tools/zoo_page.py`."""
    assert PAGE.read_text(encoding="utf-8") == zoo_page.write_page([*ZOOS.values()])


@pytest.mark.parametrize("seed", ZOOS)
def test_claims(seed: int) -> None:
    """Nothing is wrong without an error, and nearly all is right or refused by name."""
    zoo = ZOOS[seed]
    assert zoo.count("wrong") == 0
    assert zoo.count("whole", "right", "refused") >= 0.97 * len(zoo.rows)
    assert zoo.count("whole") >= 0.92 * len(zoo.rows)


@pytest.mark.parametrize("page", ["README.md", "notebooks/loops/torch.md"])
def test_what_others_say_of_it(page: str) -> None:
    """The numbers of the first."""
    zoo, n = ZOOS[FIRST], len(ZOOS[FIRST].rows)
    right, whole = zoo.count("whole", "right", "refused") / n, zoo.count("whole") / n
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    assert re.findall(r"Of (\d+) models drawn by lot.*? (\d+)%.*? (\d+)% also", text) == [
        (str(n), f"{100 * right:.0f}", f"{100 * whole:.0f}")
    ]


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
