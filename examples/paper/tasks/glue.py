"""The nine tasks of GLUE, from the files of its distribution or from JSON lines.

    DIR/CoLA/train.tsv  DIR/CoLA/dev.tsv  DIR/MNLI/dev_matched.tsv …     # as distributed
    DIR/CoLA/train.jsonl  DIR/CoLA/validation.jsonl …                    # as in Hugging Face's hub

    examples = glue.read(DIR, "mnli", "dev_matched")

The order of the classes is that of Hugging Face's data sets. JSON lines give the class by its
number or by its name, as SuperGLUE does, whose `val.jsonl` is read too. Test files have no labels
and are not read.
"""

import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import files


class Example(NamedTuple):
    """One or two texts, and the number of their class or their score."""

    texts: tuple[str, ...]
    label: int | float


@dataclasses.dataclass(frozen=True)
class Task:
    """How the files of a task look.

    Attributes:
        folder: its name in the distribution.
        texts: the columns with the texts.
        label: the column with the label.
        classes: their names; none for a score from 0 to 5.
        numbered: whether TSV files give the number of the class.
        fields: the names of the texts in JSON lines, where they may differ from `texts`.
        headless: the columns of the training and development files where these have no header.
        dev: the splits to evaluate on.
        damaged: the most lines of a file that may have too few fields: QQP's, as distributed, have
            some, which other readers skip in silence.
    """

    folder: str
    texts: tuple[str, ...]
    label: str = "label"
    classes: tuple[str, ...] = ("entailment", "not_entailment")
    numbered: bool = False
    fields: tuple[str, ...] = ()
    headless: tuple[str, ...] = ()
    dev: tuple[str, ...] = ("dev",)
    damaged: int = 0

    @property
    def splits(self) -> tuple[str, ...]:
        """All splits."""
        return ("train", *self.dev)


PAIR = ("sentence1", "sentence2")
INFERENCE = ("premise", "hypothesis")
TASKS = {
    "cola": Task(
        "CoLA",
        ("sentence",),
        classes=("unacceptable", "acceptable"),
        numbered=True,
        headless=("source", "label", "mark", "sentence"),
    ),
    "sst2": Task("SST-2", ("sentence",), classes=("negative", "positive"), numbered=True),
    "mrpc": Task(
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        classes=("not_equivalent", "equivalent"),
        numbered=True,
        fields=PAIR,
    ),
    "stsb": Task("STS-B", PAIR, "score", classes=()),
    "qqp": Task(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        classes=("not_duplicate", "duplicate"),
        numbered=True,
        damaged=50,
    ),
    "mnli": Task(
        "MNLI",
        PAIR,
        "gold_label",
        classes=("entailment", "neutral", "contradiction"),
        fields=INFERENCE,
        dev=("dev_matched", "dev_mismatched"),
    ),
    "qnli": Task("QNLI", ("question", "sentence")),
    "rte": Task("RTE", PAIR, fields=INFERENCE),
    "wnli": Task("WNLI", PAIR, classes=("not_entailment", "entailment"), numbered=True),
}


def read(folder: str | Path, task: str, split: str) -> list[Example]:
    """The examples of a split; damaged lines, where some may be, are left out with a warning.

    Args:
        folder: that of GLUE, or that of the task.
        task: a key of `TASKS`.
        split: one of `TASKS[task].splits`.

    Raises:
        FileNotFoundError: there is no such file; the message says what to put where.
        FormatError: a line is not as it should be.
        ValueError: `task` or `split` is unknown, or there are several files of the split.
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}")
    spec = TASKS[task]
    if split not in spec.splits:
        raise ValueError(
            f"`split` of {task} must be one of {', '.join(spec.splits)}, got {split!r}"
        )
    path = _find(Path(folder), spec, split)
    if path.suffix == ".tsv":
        return files.some(path, _read_tsv(path, spec))
    lines = files.json_lines(path)
    return files.some(path, (_from_json(place, item, spec) for place, item in lines))


def _find(folder: Path, spec: Task, split: str) -> Path:
    inner = folder / spec.folder
    others = [split.replace("dev", name) for name in ("validation", "val")]  # the hub, SuperGLUE
    names = dict.fromkeys(f"{name}.jsonl" for name in (split, *others))
    source = f"the folder {spec.folder} of GLUE as distributed, or the same split as JSON lines,"
    return files.find(inner if inner.is_dir() else folder, [f"{split}.tsv", *names], source)


def _read_tsv(path: Path, spec: Task) -> Iterator[Example]:
    columns, rows = files.tsv(path, spec.headless)
    if lost := [name for name in (*spec.texts, spec.label) if name not in columns]:
        raise files.Place(path, 1).error(f"a header with {_quoted(lost)}", _quoted(columns))
    where = [columns.index(name) for name in spec.texts]
    skipped = []
    for number, row in rows:
        place = files.Place(path, number)
        if len(row) < len(columns) and len(skipped) < spec.damaged:
            skipped.append(number)
            continue
        if len(row) != len(columns):
            more = f" after {len(skipped)} damaged lines, the most that there may be"
            got = f"{len(row)}{more if skipped else ''}"
            raise place.error(f"{len(columns)} fields, {_quoted(columns)}", got)
        label = _label(place, row[columns.index(spec.label)], spec)
        yield Example(tuple(row[i] for i in where), label)
    if skipped:
        message = f"`{path}`: left out {len(skipped)} lines with too few fields: {skipped}"
        warnings.warn(message, stacklevel=3)


def _from_json(place: files.Place, record: Any, spec: Task) -> Example:
    own = not spec.fields or all(name in record for name in spec.texts)
    names = spec.texts if own else spec.fields
    texts = tuple(place.text(record, name) for name in names)
    label = place.field(record, "label", (int, float, str), "a number or a name")
    return Example(texts, _label(place, label, spec))


def _label(place: files.Place, value: Any, spec: Task) -> int | float:
    """The label from the text of a TSV file or the value of a JSON field."""
    if not spec.classes:
        try:
            score = float(value)
        except ValueError:
            score = math.nan
        if not 0 <= score <= 5:
            raise place.error("a score from 0 to 5", value)
        return score
    if isinstance(value, str) and spec.numbered and value in map(str, range(len(spec.classes))):
        return int(value)
    if isinstance(value, str) and value in spec.classes:
        return spec.classes.index(value)
    if type(value) is int and 0 <= value < len(spec.classes):
        return value
    numbers = f"0 to {len(spec.classes) - 1}, or " if spec.numbered or type(value) is int else ""
    raise place.error(f"{numbers}one of {_quoted(spec.classes)}", value)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
