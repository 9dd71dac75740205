"""A checkpoint to merge into, and what may have to be added to it first: new tokens, a head."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..._errors import Problem
from .._changed import change
from .._checkpoint import Checkpoint
from .._file import TensorInfo
from .._submodels import copy_config, walk_objects
from ..adapter._fits import explain_resized
from ..adapter._parts import Headers, Parameters, T
from ..adapter._sorted import Adapter
from ..places._declared import find_class, is_table
from ..places._find import load_table
from ..places._views import Piece, Places, Shape, View


class Target(NamedTuple):
    """A checkpoint, and its parameters by the names that the adapter uses."""

    checkpoint: Checkpoint
    model: Places

    def change(
        self,
        config: Mapping[str, Any],
        *,
        resized: Mapping[str, Shape] = {},
        added: Mapping[str, tuple[TensorInfo, str | None]] = {},
        prefix: str = "",
    ) -> "Target":
        """Gives the checkpoint a configuration, and other tensors.

        Args:
            config: the configuration.
            resized: new shapes of parameters of one tensor each.
            added: new tensors by the adapter's names, each with the tensor that has its old values.
            prefix: what the names of all other tensors get, as the adapter's have it and theirs
                lack it: `transformers` does not read a head beside names without it.
        """
        shapes = {self.model.tensor(name): shape for name, shape in resized.items()}
        new = {info.key: (info, origin) for info, origin in added.values()}
        checkpoint = change(self.checkpoint, config, prefix=prefix, resized=shapes, added=new)
        model = Places()
        for name, view in self.model.items():
            pieces = tuple(x._replace(tensor=prefix + x.tensor) for x in view.pieces)
            model[name] = View(resized.get(name, view.shape), pieces)
        model |= {name: View(x.shape, (Piece(x.key),)) for name, (x, _) in added.items()}
        model.prefix = "" if added else self.model.prefix
        return Target(checkpoint, model)


# ---------------------------------------------------------------- a vocabulary that was resized


def fit_vocabulary(target: Target, found: Parameters[T]) -> tuple[Target, list[Problem]]:
    """Resizes embedding and head, and what else has a number for each token, as the adapter did.

    It is a problem if the adapter does not hold all of these.
    """
    checkpoint, model = target
    records = {name: x for name, x in found.whole.items() if name in model}
    tables = {name for name, x in records.items() if explain_resized(x, model[name].shape)}
    whole = {name: x.x for name, x in records.items()}
    sizes = {(model[name].shape[0], whole[name].shape[0]) for name in tables}
    if len(sizes) != 1:
        return target, []
    problems = list[Problem]()
    [(old, new)] = sizes
    shapes = {
        name: x.shape
        for name, x in whole.items()
        if (old, new) == (*model[name].shape[:1], *x.shape[:1])
        and model[name].shape[1:] == x.shape[1:]
        and model[name].is_tensor
    }
    columns = {shape[1] for shape in shapes.values() if len(shape) == 2}
    resized = {model.tensor(name) for name in shapes}
    for tensor, shape in checkpoint.shapes.items():
        is_matrix = shape[:1] == (old,) and is_table(tensor.rpartition(".")[0])
        is_vector = shape in ((old,), (1, old)) and old not in columns
        if tensor not in resized and (is_matrix or is_vector):
            why = (
                f"is for {old} tokens, and the adapter, whose vocabulary was resized to {new}, has "
                "no values of it"
            )
            remedy = f"Call resize_token_embeddings({new}) on the base in `transformers`"
            problems.append(Problem(tensor, why, f"{remedy}, and save it."))
    return target.change(_resize(checkpoint.config, old, new), resized=shapes), problems


def _resize(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """Sets the size of the vocabulary in a configuration, if there is one."""
    found = copy_config(config)
    parts = [part for part in walk_objects(found) if part.get("vocab_size") == old]
    # A size that is the default of a class may be left out.
    texts = [x for part in walk_objects(found) if isinstance(x := part.get("text_config"), dict)]
    for part in parts or texts[:1] or [found] * bool(found):
        part["vocab_size"] = new
    return found


# ---------------------------------------------------------------- a head that the base lacks


_LABELS, _MOST = 2, 100_000  # labels where a configuration does not say how many, and at most


def add_head(target: Target, contents: Headers, adapter: Adapter) -> Target:
    """Adds what `modules_to_save` has and the checkpoint lacks.

    The configuration gets the class of the model with that head, and its labels. Nothing is added
    if the adapter does not tell the class, or the checkpoint's names are not known.
    """
    checkpoint, model = target
    # What is missing inside of the model may only have another name there.
    inside = {name.partition(".")[0] for name in model}
    lost = {n: x.x for n, x in contents.full.items() if n.partition(".")[0] not in inside}
    modules = {name: name.rpartition(".")[0] for name in lost}
    saves = adapter.roles.saves
    new = {n: x for n, x in lost.items() if saves(modules[n]) and not is_table(modules[n])}
    if not new or model.prefix is None:
        return target
    config = _with_head(checkpoint.config, adapter.fields, new)
    if config is None:
        return target
    added = {name: (x._replace(key=name), None) for name, x in new.items()}
    return target.change(config, added=added, prefix=model.prefix)


def _with_head(
    config: Mapping[str, Any], fields: Mapping[str, Any], head: Mapping[str, TensorInfo]
) -> dict[str, Any] | None:
    """Returns the configuration of the model with the head; None if its class is not known."""
    if (name := find_class_of(config, fields)) is None or not config:
        return None
    new = copy_config(config) | {"architectures": [name]}
    weight = load_table()["labels"].get(name, "")  # None where it is not known
    if weight == "":
        return new
    labels = head[weight].shape[0] if weight in head else _MOST + 1
    if labels > _MOST:
        return None
    known = config.get("id2label")
    count = len(known) if isinstance(known, dict) else config.get("num_labels", _LABELS)
    if labels != count:
        new["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        new["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
        new |= {"num_labels": labels} if "num_labels" in config else {}
    return new


def find_class_of(config: Mapping[str, Any], fields: Mapping[str, Any]) -> str | None:
    """Finds the class of the adapted model: PEFT writes it, or the task instead.

    None if `transformers` has no such class.
    """
    mapping = fields.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if name is None:
        classes = load_table()["tasks"].get(str(fields.get("task_type")), {})
        name = classes.get(str(config.get("model_type")))
    is_known = isinstance(name, str) and find_class({**config, "architectures": [name]})
    return name if is_known else None
