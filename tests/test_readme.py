"""The README: its code runs, and its links lead somewhere."""

import code
import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def blocks(path: pathlib.Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def test_the_first_block_runs_alone_and_prints_what_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Pasted into an interactive Python, too. The guides show the parts of the page."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [first] = blocks(ROOT / "README.md")
    example = (ROOT / "examples" / "minimal.py").read_text(encoding="utf-8")
    assert first.strip() == example.split('"""')[2].strip() and len(first.splitlines()) <= 40
    console = code.InteractiveConsole()
    for line in (*first.splitlines(), ""):
        console.push(line)
    printed = "".join(f"    {line}\n" for line in capsys.readouterr().out.splitlines())
    assert f"```\n\n{printed}\n" in text
    before, after = (float(x) for x in re.findall(r"loss .*: (\S+)", printed))
    assert after < before / 10
    index = (ROOT / "notebooks" / "index.md").read_text(encoding="utf-8")
    marks = re.findall(r":(?:start-after|end-before): (<!-- \w+ -->)", index)
    assert marks and all(text.count(mark) == 1 for mark in marks)


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
