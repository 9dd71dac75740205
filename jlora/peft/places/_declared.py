"""What classes of `transformers` declare: weights that are one, and weights that are transposed."""

import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from .._submodels import TIE, class_of, walk_objects
from ._find import as_transformers_stores, load_table, name_stored, stored_as_is
from ._views import Places, Shapes


class Declared(NamedTuple):
    """What a class declares, by the names of its parameters and modules.

    Attributes:
        table: the embedding of tokens; empty if there is none.
        head: the output head; empty if there is none.
        prefix: the first component of its parameters that its base model lacks; empty for that.
        always: parameters that are others, whatever the configuration says.
        asked: those that are others if `tie_word_embeddings` says so, by the path in the
            configuration of the submodel that says it.
        default: what it says by default, by these paths.
        inside: the `model_type` of submodels that tie parameters of their own, by these paths;
            those of another kind may have others.
        unclear: whether it is not known what is tied.
    """

    table: str = ""
    head: str = ""
    prefix: str = ""
    always: Mapping[str, str] = {}
    asked: Mapping[str, Mapping[str, str]] = {}
    default: Mapping[str, bool] = {}
    inside: Mapping[str, str] = {}
    unclear: bool = False


class Ties(NamedTuple):
    """The parameters of a checkpoint's model that are others.

    Attributes:
        sources: by the tensors that have them, or would have them, the tensor of the other.
        untied: those of `sources` that have a weight of their own if the configuration says so.
        names: the names of these parameters in the model, by the tensors.
        prefix: what the names of all tensors need beside a head, as the model has it.
        paths: the submodels whose configurations tie.
        output: the tensor of the class's output head; empty if it has none.
    """

    sources: Mapping[str, str] = {}
    untied: tuple[str, ...] = ()
    names: Mapping[str, str] = {}
    prefix: str = ""
    paths: tuple[str, ...] = ()
    output: str = ""

    def tensor(self, name: str, model: Places) -> str:
        """Returns the tensor that has a parameter, or would have it."""
        aliases = {own: tensor for tensor, own in self.names.items()}
        return model[name].tensor if name in model else aliases.get(name, name)

    def group(self, tensor: str) -> list[str]:
        """Lists the tensors of one parameter; none if it has one name only."""
        source = self.sources.get(tensor, tensor)
        others = [x for x, own in self.sources.items() if own == source]
        return [source, *others] if others else []

    @property
    def head(self) -> str | None:
        """The one weight that the configuration ties; None if there are several."""
        weights = [x for x in self.sources if x.endswith(".weight")]
        return weights[0] if len(weights) == 1 and weights[0] in self.untied else None


@functools.cache
def _load_classes() -> Mapping[str, Declared]:
    return {
        name: Declared(**{key: x for key, x in own.items() if key != "classes"})
        for own in load_table()["declared"]
        for name in own["classes"]
    }


def find_class(config: Mapping[str, Any]) -> Declared | None:
    """Finds what the class of a configuration declares; None if `transformers` has no such one."""
    name = class_of(config)
    classes = _load_classes()
    return classes.get(f"{config.get('model_type')}/{name}", classes.get(name))


def find_transposed(config: Mapping[str, Any]) -> set[str] | None:
    """Finds the last names of modules whose weights are (inputs, outputs), of all submodels.

    None if the model is not known.
    """
    modules = load_table()["transposed"]
    if config.get("model_type") not in modules:
        return None
    kinds = (str(part.get("model_type")) for part in walk_objects(config))
    return {name for kind in kinds for name in modules.get(kind, ())}


@functools.cache
def _load_tables() -> frozenset[str]:
    return frozenset(load_table()["tables"])


def is_table(module: str) -> bool:
    """Whether some class has an embedding or a head, and nothing else, by the end of this name."""
    parts = module.split(".")
    return not _load_tables().isdisjoint({parts[-1], ".".join(parts[-2:])})


def find_ties(shapes: Shapes, config: Mapping[str, Any]) -> Ties | None:
    """Finds which tensors of a checkpoint a model reads as other parameters too.

    A tensor that is missing is another one if its class may tie it, and nothing denies it.

    Args:
        shapes: the shapes of the checkpoint's tensors.
        config: its configuration.

    Returns:
        None if the class is not known, or not what it ties.
    """
    own = find_class(config)
    if own is None or own.unclear:
        return None
    if not (own.always or own.asked):
        return Ties()
    if (home := _find_home(own, shapes, config)) is None:
        return None
    places, prefix, is_renamed = home

    def find(name: str) -> str:
        if (stored := name.removeprefix(prefix)) in places:
            return places[stored].tensor
        return name_stored(name, config) if is_renamed else name

    # Version 4 leaves out what is true at the top, and PEFT reads it so.
    is_old = str(config.get("transformers_version")).partition(".")[0] in ("2", "3", "4")
    asked = dict[str, str]()
    for path, ties in own.asked.items():
        part = get_part(config, path)
        kind = str(part.get("model_type", own.inside.get(path)))
        if path in own.inside and kind != own.inside[path]:
            return None
        says = part.get(TIE)
        if says is None:
            default = own.default[path] or is_old if path == "" else kind in load_table()["tying"]
            says = default or any(find(x) not in shapes for pair in ties.items() for x in pair)
        asked |= ties if says else {}
    names = {find(name): name for name in (*own.always, *asked)}
    sources = {find(name): find(x) for name, x in (*own.always.items(), *asked.items())}
    output = find(f"{own.head}.weight") if own.head else ""
    return Ties(sources, tuple(map(find, asked)), names, prefix, tuple(own.asked), output)


def _find_home(
    own: Declared, shapes: Shapes, config: Mapping[str, Any]
) -> tuple[Places, str, bool] | None:
    """Finds the class's parameters; what their names there lack; whether they are renamed."""
    written = [(places, True) for places in as_transformers_stores(shapes, config)]
    tried = [*written, *((places, False) for places in stored_as_is(shapes))]
    others = {**own.always, **own.asked.get("", {})}.values()
    known = [f"{x}.weight" for x in (own.table, own.head) if x] or others
    prefixes = ("", f"{own.prefix}.")
    # By the embedding first: a head may be stored under one name everywhere, or not at all.
    for name, prefix, (places, is_renamed) in itertools.product(known, prefixes, tried):
        if name.removeprefix(prefix) in places:
            return places, prefix, is_renamed
    return None


def get_part(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """Returns the configuration of a submodel; an empty one if there is none."""
    for key in filter(None, path.split(".")):
        part = config.get(key)
        config = part if isinstance(part, dict) else {}
    return config
