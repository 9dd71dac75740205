"""E2E, WebNLG and DART: prompts and the texts that people wrote for them.

    DIR/trainset.csv  devset.csv  testset_w_refs.csv               # E2E
    DIR/train/**/*.xml  dev/**/*.xml  test/**/*.xml                # WebNLG's releases
    DIR/dart-v1.1.1-full-train.json …                              # DART

    examples = nlg.read(DIR, "e2e", "test")

Inputs that occur several times are one example with several references, in the order of the file:
so the official scripts score. `pairs` makes a row of each reference again, for training. WebNLG
marks some texts as bad: they are no references, and what has no others is left out.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import files

SPLITS = ("train", "dev", "test")
WEBNLG_TESTS = ("testdata_with_lex.xml", "rdf-to-text-generation-test-data-with-refs-en.xml")


class Example(NamedTuple):
    """What is given, what people wrote, and WebNLG's category (which may be unseen in training)."""

    prompt: str
    references: tuple[str, ...]
    category: str = ""


def read(folder: str | Path, task: str, split: str) -> list[Example]:
    """The examples of a split, grouped by prompt and category.

    Args:
        folder: that of the data set.
        task: e2e, webnlg or dart.
        split: train, dev or test.

    Raises:
        FileNotFoundError: there is no such file; the message says what to put where.
        FormatError: a file is not as it should be.
        ValueError: `task` or `split` is unknown, or there are no examples with texts, or several
            files of the split.
    """
    if task not in READERS:
        raise ValueError(f"`task` must be one of {', '.join(READERS)}, got {task!r}")
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}")
    if not (examples := grouped(READERS[task](Path(folder), split))):
        raise ValueError(f"`{folder}`: expected an example with a text in {split} of {task}, got 0")
    return examples


def grouped(examples: Iterable[Example]) -> list[Example]:
    """Puts the references of one prompt together.

    Example:
        >>> grouped([Example("a", ("x",)), Example("b", ("y",)), Example("a", ("z",))])[0]
        Example(prompt='a', references=('x', 'z'), category='')
    """
    references: dict[tuple[str, str], tuple[str, ...]] = {}
    for prompt, texts, category in examples:
        if texts:
            key = prompt, category
            references[key] = references.get(key, ()) + texts
    return [Example(prompt, texts, category) for (prompt, category), texts in references.items()]


def pairs(examples: Iterable[Example]) -> list[tuple[str, str]]:
    """A prompt and a reference each, for training."""
    return [(prompt, text) for prompt, texts, _ in examples for text in texts]


# ---- one function for each data set -------------------------------------------------------------


def _e2e(folder: Path, split: str) -> Iterator[Example]:
    name = {"test": "testset_w_refs"}.get(split, f"{split}set") + ".csv"
    path = files.find(folder, [name], f"the {name} of the E2E data set")
    for number, row in files.csv_rows(path, ("mr", "ref")):
        slots = re.findall(r"([^\[\],]+)\[([^\]]*)\](?:, |$)", row["mr"])
        if ", ".join(f"{slot}[{value}]" for slot, value in slots) != row["mr"] or not slots:
            raise files.Place(path, number).error("mr as name[…], eatType[…]", row["mr"])
        yield Example(_joined(slots), (row["ref"],))


def _webnlg(folder: Path, split: str) -> Iterator[Example]:
    paths = sorted((folder / split).rglob("*.xml"))
    # Beside it lie parts of it, its inputs alone, and the set of another task.
    paths = [path for path in paths if path.name in WEBNLG_TESTS] or paths
    if not paths:
        raise FileNotFoundError(
            f"`{folder / split}` holds no *.xml. Put the XML files of a WebNLG release there."
        )
    for path in paths:
        yield from _webnlg_xml(path)


def _webnlg_xml(path: Path) -> Iterator[Example]:
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise files.Place(path, error.position[0]).error("XML", str(error)) from None
    if root.tag != "benchmark":
        raise files.Place(path).error("<benchmark>", f"<{root.tag}>")
    if root.find("entries/entry") is None:
        raise files.Place(path).error("<entry> in <entries>", [node.tag for node in root])
    for entry in root.iterfind("entries/entry"):
        place = files.Place(path, inside=f"entry {entry.get('eid')}")
        triples = [node.text or "" for node in entry.iterfind("modifiedtripleset/mtriple")]
        parts = [triple.split(" | ") for triple in triples]
        if not parts or any(len(part) != 3 for part in parts):
            raise place.error("<mtriple>subject | property | object</mtriple>", triples)
        if "category" not in entry.attrib:
            raise place.error("an attribute category", sorted(entry.attrib))
        texts = [
            (lex.text or "").strip()
            for lex in entry.iterfind("lex")
            if lex.get("comment", "good") == "good" and lex.get("lang") in (None, "", "en")
        ]
        yield Example(_joined(parts), tuple(texts), entry.attrib["category"])


def _dart(folder: Path, split: str) -> Iterator[Example]:
    name = f"dart-*-full-{split}.json"
    path = files.find(folder, [name], f"{name.replace('*', 'v1.1.1')} of DART")
    for place, record in _records(path):
        triples = place.field(record, "tripleset", list, "a list")
        for triple in triples:
            if not isinstance(triple, list) or [type(part) for part in triple] != [str] * 3:
                raise place.error("three texts a triple", triple)
        texts = place.field(record, "annotations", list, "a list")
        prompt = _joined([(subject, name.lower(), value) for subject, name, value in triples])
        yield Example(prompt, tuple(place.text(text, "text") for text in texts))


READERS: dict[str, Callable[[Path, str], Iterator[Example]]] = {
    "e2e": _e2e,
    "webnlg": _webnlg,
    "dart": _dart,
}


def _records(path: Path) -> Iterator[tuple[files.Place, Any]]:
    """The items of a JSON list, and where they stand."""
    items = files.json_file(path)
    if not isinstance(items, list):
        raise files.Place(path).error("a list", f"{type(items).__name__}")
    for number, item in enumerate(items, 1):
        yield files.Place(path, inside=f"item {number}"), item


def _joined(parts: Iterable[Iterable[str]]) -> str:
    """Slots or triples as one line, in the way of Li and Liang's prefix tuning and of the paper.

    E2E's slots keep their names, which the paper's files have changed: priceRange is price there.
    """
    return " | ".join(" : ".join(part) for part in parts)
