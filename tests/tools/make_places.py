"""Finds out where `transformers` stores the parameters of each of its models, by their values.

    python tests/tools/make_places.py

Each element of a tiny model gets a number of its own. The folder that `save_pretrained` writes then
tells for each of them in which tensor it is, and where. Rows are made of what differs from the
model, and checked: they must give all parameters back. Needs `transformers` 5, PyTorch, timm and
torchvision.
"""

import collections
import json
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from ask_classes import declare
from safetensors.torch import load_file
from tiny_models import Pair, list_options, list_pairs, list_parts, make_model

import jlora
from jlora.peft.places._rows import Renaming, make_table
from jlora.peft.places._views import Piece

FILE = pathlib.Path(jlora.__file__).parent / "peft" / "places" / "transformers.json"
FIRST, MOST = 100_000, 2**24  # above the numbers in buffers; exact in float32
FIELDS = "rows", "read", "parts"  # of `Made`, by `model_type` or by class
Names = tuple[str, ...]


class WrongRowsError(Exception):
    """Rows do not say where the parameters of a model are."""


class Box(NamedTuple):
    """A box of a parameter, and the box of a tensor that has its values."""

    tensor: str
    at: tuple[slice, ...]
    own: tuple[slice, ...]


# ---------------------------------------------------------------------------------------- by value


def ask(model: Any) -> tuple[dict[str, list[Box] | str], dict[str, Any], dict[str, Any]]:
    """Finds the boxes of each parameter, or why it has none; and shapes, in memory and stored."""
    stop = FIRST
    saved = list_saved(model)
    with torch.no_grad():
        for x in saved.values():
            x.copy_((torch.arange(x.numel()) + stop).view(x.shape))
            stop += x.numel()
    if stop >= MOST:
        raise ValueError(f"{stop} parameters are too many")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = load_file(pathlib.Path(folder) / "model.safetensors")
    stored = {k: (x.double() if x.is_floating_point() else x) for k, x in tensors.items()}
    home = np.full(stop, -1)
    place = np.zeros(stop, int)
    for i, x in enumerate(stored.values()):
        values = x.numpy().astype(np.int64).ravel()
        known = (values >= FIRST) & (values < stop)
        home[values[known]] = i
        place[values[known]] = np.flatnonzero(known)
    shapes = {name: (*x.shape,) for name, x in stored.items()}
    parameters = {name: x.detach().numpy().astype(int) for name, x in saved.items()}
    found = {name: _find_boxes(home[x], place[x], shapes) for name, x in parameters.items()}
    return found, {name: x.shape for name, x in parameters.items()}, shapes


def list_saved(model: Any) -> dict[str, Any]:
    """Lists parameters, and the buffers in floats that are saved, if there are not too many."""
    saved = model.state_dict(keep_vars=True).keys()
    buffers = {n: x for n, x in model.named_buffers() if n in saved and x.is_floating_point()}
    parameters = dict(model.named_parameters())
    both = parameters | buffers
    return both if sum(x.numel() for x in both.values()) < MOST - FIRST else parameters


def _find_boxes(home: np.ndarray, place: np.ndarray, shapes: Mapping[str, Any]) -> list[Box] | str:
    names = list(shapes)
    found = list[Box]()
    for i in dict.fromkeys(home.ravel().tolist()):
        if i < 0:
            return "not stored"
        own = _find_box(np.argwhere(home == i), home.ndim)
        if own is None:
            return f"no box of {names[i]}"
        values = place[own]
        shape = shapes[names[i]]
        every = np.arange(np.prod(shape, dtype=int)).reshape(shape)
        box = _find_box(np.argwhere(np.isin(every, values)), len(shape))
        if box is None or not np.array_equal(every[box].ravel(), values.ravel()):
            return f"in another order in {names[i]}"
        found.append(Box(names[i], box, own))
    return found


def _find_box(at: np.ndarray, ndim: int) -> tuple[slice, ...] | None:
    """Returns the box of these indices; None if they are none."""
    if not ndim:
        return ()
    low, high = at.min(0), at.max(0) + 1
    return tuple(map(slice, low, high)) if np.prod(high - low) == len(at) else None


# -------------------------------------------------------------------------------------------- rows


class Label(NamedTuple):
    """What a row says of a stored name: both beginnings, and both boxes as texts."""

    stored: Names
    at: str
    name: Names
    own: str


Labels = frozenset[Label]  # of one name: several if the tensor is split
SAME = frozenset({Label((), "", (), "")})


class Made(NamedTuple):
    """What was found out about a class.

    Attributes:
        name: the class.
        kind: its `model_type`.
        prefix: the first component of its parameters that its base model lacks; "" for that.
        rows: where it stores its parameters.
        read: what else it reads.
        lost: the parameters that are in no boxes, and why.
        parts: the submodels, each with the field of its configuration and its `model_type`.
        stored: the shapes of what it stores.
        others: the names that it reads beside them, each with the parameter.
        is_own: whether the `model_type` is the class's own.
    """

    name: str
    kind: str
    prefix: str
    rows: dict[str, str]
    read: dict[str, str]
    lost: dict[str, str]
    parts: dict[str, str]
    stored: dict[str, Any]
    others: dict[str, str]
    is_own: bool


def make(model: Any) -> Made:
    """Finds out where a tiny model stores its parameters."""
    rows, lost, stored, held = make_rows(model)
    shapes = {name: x.shape for name, x in list_saved(model).items()}
    others = {x: name for name, x in list_others(model, stored.keys()) if x not in stored}
    others = {x: name for x, name in others.items() if name in shapes or name in held}
    every = held | {x: held.get(name) or [(name, "", "")] for x, name in others.items()}
    read = dict(_compress(_generalize(every)))
    read = {stored: name for stored, name in read.items() if rows.get(stored) != name}
    sizes = {x: stored.get(name) or shapes[name] for x, name in others.items()}
    wanted = {own for x in others for own, *_ in every[x]}
    if Renaming(rows | read).name(sizes).keys() != wanted:
        read = {}
    prefix = model.base_model_prefix
    prefix = prefix if prefix and hasattr(model, prefix) else ""
    kind = model.config.model_type
    is_own = kind == getattr(model.config_class, "model_type", kind)
    parts = find_parts(model)
    name = type(model).__name__
    return Made(name, kind, prefix, rows, read, lost, parts, stored, others, is_own)


def list_others(model: Any, stored: Set[str]) -> Iterator[tuple[str, str]]:
    """Yields the parameters, each with other names under which `transformers` reads it.

    Tensors that are split or joined as they are read have their own names here.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming

    def rename(name: str, renamings: Sequence[Any]) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    every = get_model_conversion_mapping(model, add_legacy=False)
    every = [x for x in every if isinstance(x, WeightRenaming)]
    saved = [x for x in every if not isinstance(x, PrefixChange)]
    choices = [[x.reverse_transform() for x in own[::-1]] for own in (saved, every)]
    names = model.state_dict().keys()
    for name in names:
        for other in dict.fromkeys(rename(name, own) for own in choices):
            if other not in names and rename(other, every) == name:
                yield name, other
    prefixes = [x.reverse_transform() for x in every[::-1] if isinstance(x, PrefixChange)]
    for name in stored - names:
        other = rename(name, prefixes)
        if other != name and rename(other, every) == rename(name, every):
            yield name, other


def find_parts(model: Any) -> dict[str, str]:
    """Finds submodels with configurations of their own."""
    parts = list_parts(model.config)
    found = dict[str, str]()
    for path, x in model.named_modules():
        if not isinstance(x, transformers.PreTrainedModel) or x.config is model.config:
            continue
        fields = [key for key, own in parts.items() if own is x.config]
        if fields and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = f"{fields[0]}:{x.config.model_type}"
    return found


def make_rows(model: Any) -> tuple[dict[str, str], dict[str, str], dict[str, Any], dict[str, Any]]:
    """Makes the rows of a model, and lists the parameters without boxes, with the reasons."""
    found, own, stored = ask(model)
    lost = {name: why for name, why in found.items() if isinstance(why, str)}
    held = collections.defaultdict[str, list[tuple[str, str, str]]](list)
    for name, boxes in found.items():
        if isinstance(boxes, str) or not boxes:
            continue
        try:
            for box, place in zip(boxes, _place(boxes, own[name], stored), strict=True):
                held[box.tensor].append((name, *place))
        except ValueError as e:
            lost[name] = str(e)
    bad = {box.tensor for name in lost if not isinstance(found[name], str) for box in found[name]}
    bad |= {x for x, own in held.items() if len({at.rpartition("/")[2] for _, at, _ in own}) > 1}
    for tensor in held.keys() & bad:
        lost |= {n: f"in unequal parts of {tensor}" for n, *_ in held[tensor] if n not in lost}
    held = {tensor: x for tensor, x in held.items() if tensor not in bad}
    rows = dict(_compress(_generalize(held)))
    _check(rows, {n: x for n, x in found.items() if n not in lost}, own, stored)
    return rows, lost, stored, held


def _place(boxes: Sequence[Box], shape: Any, stored: Any) -> Iterator[tuple[str, str]]:
    """Yields both boxes of each piece as texts."""
    for box in boxes:
        at = _write_part(box.at, stored[box.tensor])
        size = tuple(x.stop - x.start for x in box.at)
        is_indexed = len(size) == len(shape) - 1
        if len(size) != len(shape) and not is_indexed:
            raise ValueError(f"of another shape in {box.tensor}")
        others = [x for x in boxes if x.own[0] == box.own[0]] if is_indexed else boxes
        rest = slice(is_indexed, None)
        text = _write_order(box.own[rest], [x.own[rest] for x in others], shape[rest])
        entries = ["{}"] * is_indexed + ([text] if text else [])
        yield at, f"[{','.join(entries)}]" if entries else ""


def _write_part(box: Sequence[slice], shape: Sequence[int]) -> str:
    """Writes a box as one of equal parts of the rows."""
    if (rows := _find_rows(box, shape)) is None:
        return ""
    size = rows.stop - rows.start
    if shape[0] % size or rows.start % size:
        raise ValueError("in unequal parts of a tensor")
    return f"[{rows.start // size}/{shape[0] // size}]"


def _write_order(box: Any, others: Sequence[Any], shape: Sequence[int]) -> str:
    """Writes a box as one of parts of the rows in order, of any sizes."""
    if (rows := _find_rows(box, shape)) is None:
        return ""
    starts = sorted({x[0].start for x in others})
    return f"{starts.index(rows.start)}/{len(starts)}"


def _find_rows(box: Sequence[slice], shape: Sequence[int]) -> slice | None:
    """Returns the rows of a box; None for all of them."""
    axes = [d for d, x in enumerate(box) if (x.start, x.stop) != (0, shape[d])]
    if axes not in ([], [0]):
        raise ValueError("in parts of its columns")
    return box[0] if axes else None


def _generalize(held: Mapping[str, Sequence[tuple[str, str, str]]]) -> dict[Names, Labels]:
    """Replaces numbers that both names have with `{}`."""
    forms = collections.defaultdict[Any, list[tuple[Names, list[tuple[str, str, str]]]]](list)
    for tensor, own in held.items():
        parts = tuple(tensor.split("."))
        forms[tuple("{}" if x.isdecimal() else x for x in parts)].append((parts, list(own)))
    found = dict[Names, Labels]()
    for members in forms.values():
        for names, labels in _split(members):
            found[names] = labels
    return found


def _split(members: Sequence[Any], literal: Names = ()) -> Iterator[tuple[Names, Labels]]:
    """Makes one template of all members, or one for each number at some place."""
    first = members[0][0]
    places = [i for i, x in enumerate(first) if x.isdecimal()]
    free = [i for i in places if str(i) not in literal]
    templates = {_template(parts, own, free) for parts, own in members}
    if len(templates) == 1 and None not in templates:
        yield templates.pop()
        return
    if not free:
        raise ValueError(f"no row for {'.'.join(first)}")
    i = min(free, key=lambda i: len({parts[i] for parts, _ in members}))
    groups = collections.defaultdict[str, list[Any]](list)
    for member in members:
        groups[member[0][i]].append(member)
    for group in groups.values():
        yield from _split(group, (*literal, str(i)))


def _template(parts: Names, own: Any, free: Sequence[int]) -> tuple[Names, Labels] | None:
    """Replaces the numbers at `free` places in both names, in order; None if one is not in both."""
    stored = tuple("{}" if i in free else x for i, x in enumerate(parts))
    labels = set()
    for name, at, box in own:
        left = collections.deque(parts[i] for i in free)
        names = []
        for x in name.split("."):
            is_next = x.isdecimal() and left and x == left[0]
            names.append("{}" if is_next else x)
            if is_next:
                left.popleft()
        if len(left) != box.startswith("[{}"):
            return None
        labels.add(_shorten(stored, at, tuple(names), box))
    return stored, frozenset(labels)


def _shorten(stored: Names, at: str, name: Names, own: str) -> Label:
    """Leaves out the last components if they are the same."""
    if own.startswith("[{}"):
        return Label(stored, at, name, own)
    n = 0
    while n < min(len(stored), len(name)) and stored[-1 - n] == name[-1 - n]:
        n += 1
    return Label(stored[: len(stored) - n], at, name[: len(name) - n], own)


def _compress(labels: Mapping[Names, Labels]) -> Iterator[tuple[str, str]]:
    """Makes the fewest rows, in a tree of components, of which the deepest wins."""
    every = sorted({SAME, *labels.values()}, key=lambda x: (x != SAME, sorted(x)))
    costs = dict[Names, dict[Labels, float]]()
    children = collections.defaultdict[Names, dict[Names, None]](dict)
    for names in labels:
        for i in range(len(names)):
            children[names[:i]][names[: i + 1]] = None

    def possible(label: Labels, names: Names) -> bool:
        return all(names[: len(x.stored)] == x.stored for x in label)

    def cost(names: Names) -> dict[Labels, float]:
        if names not in costs:
            own = {x: 0.0 for x in every if possible(x, names)}
            if names in labels:
                own = {labels[names]: 0.0}
            for child in children[names]:
                theirs = cost(child)
                least = min(theirs.values()) + 1
                own = {x: n + min(theirs.get(x, np.inf), least) for x, n in own.items()}
            costs[names] = own
        return costs[names]

    def assign(names: Names, above: Labels) -> Iterator[tuple[Names, Labels]]:
        own = cost(names)
        least = min(own.values())
        label = above if own.get(above, np.inf) <= least + 1 and above in own else None
        if label is None or (own[label] > least and own[label] >= least + 1):
            label = min(own, key=lambda x: (own[x], every.index(x)))
        if label != above:
            yield names, label
        for child in children[names]:
            yield from assign(child, label)

    for names, label in assign((), SAME):
        for x in sorted(label):
            rest = names[len(x.stored) :]
            yield _write(names, x.at), _write((*x.name, *rest), x.own)


def _write(names: Names, box: str) -> str:
    return f"{'.'.join(names)}{box}"


def _check(rows: Any, found: Any, own: Any, stored: Any) -> None:
    """Raises unless the rows give each parameter its boxes, and no name to two of them."""
    places = Renaming(rows).name(stored)
    if wrong := [name for name in places.keys() & stored.keys() if places[name].tensor != name]:
        raise WrongRowsError(rows, wrong)
    for name, boxes in found.items():
        if not boxes:
            continue
        view = places.get(name)
        if view is None or view.shape != own[name]:
            raise WrongRowsError(rows, name, view, own[name])
        shape = own[name]
        ours = {
            (x.tensor, _whole([x.at], stored[x.tensor]), _whole(_own_box(x), shape))
            for x in view.pieces
        }
        theirs = {(x, _whole(at, stored[x]), _whole(box, shape)) for x, at, box in boxes}
        if ours != theirs:
            raise WrongRowsError(rows, name, ours, theirs)


def _own_box(piece: Piece) -> list[slice]:
    expert = piece.expert
    return ([] if expert is None else [slice(expert, expert + 1)]) + [piece.rows]


def _whole(box: Iterable[slice], shape: Sequence[int]) -> Any:
    full = [(0, n) for n in shape]
    for d, x in enumerate(box):
        if d < len(shape):
            full[d] = (x.start or 0, shape[d] if x.stop is None else x.stop)
    return tuple((int(a), int(b)) for a, b in full)


# ---------------------------------------------------------------------------------------- the file


def gather(made: Sequence[Made]) -> dict[str, Any]:
    """Makes the file: rows by `model_type`, and those of the classes that have others."""
    models, classes = dict[str, Any](), dict[str, Any]()
    groups = collections.defaultdict[str, list[Made]](list)
    for x in made:
        groups[x.kind].append(x)
    for kind, own in sorted(groups.items()):
        entry = {field: _merge(own, field) for field in FIELDS}
        prefixes = collections.Counter(x.prefix for x in own if x.prefix)
        entry |= {"prefix": prefixes.most_common(1)[0][0]} if prefixes else {}
        entry = {key: x for key, x in entry.items() if x}
        if entry.keys() - {"prefix"}:
            models[kind] = entry
        for x in own:
            theirs = {field: getattr(x, field) for field in FIELDS}
            theirs["lost"] = _shorten_lost(x.lost)
            if differs(x, entry) or x.lost:
                fields = {key: dict(sorted(y.items())) for key, y in theirs.items() if y}
                name = x.name if x.is_own else f"{kind}/{x.name}"
                classes[name] = {"model": kind} | fields
    found = {"transformers": transformers.__version__, "endings": list_endings()}
    return found | {"models": models, "classes": classes}


def list_endings() -> dict[str, str]:
    """Lists the ends of names that `transformers` replaces in old checkpoints of any model."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    pairs = [
        (old, new)
        for x in get_checkpoint_conversion_mapping("legacy")
        for old, new in zip(x.source_patterns, x.target_patterns, strict=False)
    ]
    return {old: new for old, new in pairs if re.fullmatch(r"[\w.]+", old)}


def _merge(made: Sequence[Made], field: str) -> dict[str, Any]:
    """Merges what classes say of their base model; of several, what most say."""
    votes = collections.defaultdict[str, collections.Counter[Any]](collections.Counter)
    for x in made:
        start = f"{x.prefix}." if x.prefix else ""
        for stored, own in getattr(x, field).items():
            if stored.startswith(start) and (field == "parts" or own.startswith(start)):
                own = own if field == "parts" else own.removeprefix(start)
                votes[stored.removeprefix(start)][own] += 1
    return {stored: found.most_common(1)[0][0] for stored, found in sorted(votes.items())}


def differs(x: Made, entry: Mapping[str, Any]) -> bool:
    """Whether the rows of a `model_type` say something else of a class than its own."""
    shapes = x.stored | dict.fromkeys(x.others, (12, 12))
    return any(
        make_table(entry, has_read).name(shapes)
        != make_table(x._asdict() | {"prefix": ""}, has_read).name(shapes)
        for has_read in (False, True)
    )


def _shorten_lost(lost: Mapping[str, str]) -> dict[str, str]:
    """Replaces numbers with `{}`."""
    template = lambda name: ".".join("{}" if x.isdecimal() else x for x in name.split("."))  # noqa: E731
    return {template(name): template(why) for name, why in sorted(lost.items())}


def make_with_options(pair: Pair) -> Made:
    """Asks tiny models of a class: by default, and with each part that it may use instead."""
    cls = pair.config_class
    found = make(make_model(pair.cls, config_class=cls))
    for option in list_options(cls) if found.rows else ():
        try:
            other = make(make_model(pair.cls, option, config_class=cls))
        except Exception:  # an option that needs others
            continue
        both = other._replace(rows=other.rows | found.rows, stored=other.stored | found.stored)
        if not any(differs(x, both._asdict() | {"prefix": ""}) for x in (found, other)):
            found = found._replace(rows=both.rows, stored=both.stored)
    return found


def make_all(pairs: Iterable[Pair]) -> Iterator[Made]:
    """Asks tiny models of all classes; those that cannot be made are left out."""
    for pair in pairs:
        try:
            yield make_with_options(pair)
        except WrongRowsError:
            raise
        except Exception as e:
            sys.stderr.write(f"{pair.cls.__name__}: {type(e).__name__} {str(e)[:99]!r}\n")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found = gather(list(make_all(list_pairs()))) | declare()
    FILE.write_text(json.dumps(found, indent=1) + "\n")
