"""The README and the first page of the guides: their code runs, and their links lead somewhere."""

import importlib
import pathlib
import re
import runpy

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MINIMAL = ROOT / "examples" / "minimal.py"


def blocks(path: pathlib.Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "notebooks/index.md"])
def test_the_first_code_is_the_example(page: str) -> None:
    """All of it but its docstring, so that it can be pasted."""
    code = MINIMAL.read_text(encoding="utf-8").split('"""')[2]
    [shown, *_] = blocks(ROOT / page)
    assert shown.strip() == code.strip()
    assert len(code.splitlines()) <= 40


def test_the_example_prints_what_the_guide_shows(capsys: pytest.CaptureFixture[str]) -> None:
    """To the letter; and what is merged is the model that was trained."""
    found = runpy.run_path(str(MINIMAL))
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    page = (ROOT / "notebooks" / "index.md").read_text(encoding="utf-8")
    shown = re.findall(r"(?:^    .*\n)+", page.split("It prints")[1], re.MULTILINE)[0]
    assert [line[4:].rstrip() for line in shown.splitlines()] == printed
    assert found["loss"] < 0.05


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


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
    said = set(re.findall(rf"^::: {re.escape(found.__name__)}\.(\w+)$", pages, re.MULTILINE))
    assert public - said == set()
