"""The README and the first page of the guides: their code runs, and their links lead somewhere."""

import code
import contextlib
import importlib
import io
import pathlib
import re
import runpy

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MINIMAL = ROOT / "examples" / "minimal.py"


def blocks(path: pathlib.Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """The lines that the example prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(MINIMAL))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def read_code() -> str:
    """The example's, without its docstring."""
    return MINIMAL.read_text(encoding="utf-8").split('"""')[2].strip()


def test_the_first_code_of_the_guides_is_the_example() -> None:
    """All of it, so that it can be pasted."""
    [shown, *_] = blocks(ROOT / "notebooks" / "start.md")
    assert shown.strip() == read_code()
    assert len(read_code().splitlines()) <= 45


def test_the_first_block_runs_alone_and_prints_what_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Pasted into an interactive Python, too. The site shows it in half of its width."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [first] = blocks(ROOT / "README.md")
    console = code.InteractiveConsole()
    for line in (*first.splitlines(), ""):
        console.push(line)
    printed = "".join(f"    {line}\n" for line in capsys.readouterr().out.splitlines())
    assert f"```\n\n{printed}\n" in text
    assert len(first.splitlines()) <= 40 and max(map(len, first.splitlines())) <= 56
    index = (ROOT / "notebooks" / "index.md").read_text(encoding="utf-8")
    marks = re.findall(r":(?:start-after|end-before): (<!-- \w+ -->)", index)
    assert marks and all(text.count(mark) == 1 for mark in marks)


def is_shown(printed: list[str]) -> bool:
    """Whether an indented block of the guide has these lines, but for rounding of percents."""
    text = (ROOT / "notebooks" / "start.md").read_text(encoding="utf-8")
    for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE):
        shown = [line[4:].rstrip() for line in block.splitlines()]
        if shown[:-2] == printed[:-2] and len(shown) == len(printed):
            pairs = zip(shown[-2:], printed[-2:], strict=True)
            return all(is_close(*pair) for pair in pairs)
    return False


def is_close(a: str, b: str) -> bool:
    """Whether two lines differ in their only number by a point at most."""
    number = r"\d+\.\d"
    x, y = (float(re.findall(number, line)[0]) for line in (a, b))
    return re.sub(number, "", a) == re.sub(number, "", b) and abs(x - y) <= 1


def test_the_guide_shows_what_the_example_prints(printed: list[str]) -> None:
    assert is_shown(printed)


def test_the_example_learns(printed: list[str]) -> None:
    before, after = (float(re.findall(r"\d+\.\d", line)[0]) for line in printed[-2:])
    assert before < 60 and after > 90


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(page: str) -> None:
    """Those of the guides are checked where the site is built."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8"))
    missing = [x for x in links if not x.startswith("https://") and not (ROOT / x).exists()]
    assert not missing


@pytest.mark.parametrize(
    "module",
    ["", "sharding", "types", "extend", "checkpoint", "peft", "analysis", "initializers", "nnx"],
)
def test_the_reference_has_every_public_name(module: str) -> None:
    """But constants and modules."""
    found = importlib.import_module(f"jlora.{module}".rstrip("."))
    public = {
        name
        for name, value in vars(found).items()
        if not name.startswith("_") and callable(value) and value.__module__.startswith("jlora")
    }
    pages = "".join(p.read_text() for p in (ROOT / "notebooks" / "reference").glob("*.md"))
    entry = rf"^\.\. auto\w+:: {re.escape(found.__name__)}\.(\w+)(?:\(.*\))?$"
    said = set(re.findall(entry, pages, re.MULTILINE))
    assert public - said == set()
