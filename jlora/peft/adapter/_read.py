"""PEFT's files, read once: what the configuration selects, and what each tensor is."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from .._file import CONFIG, COUNT, COUNTS, DTYPES, PREFIX, TENSORS, shown
from ._config import PARAMETERS, ROWS_ALONE
from ._select import Selection
from ._tokens import DELTA, DELTA_ALONE, WRAPPED, Tokens, told

BASE = ".base_layer"  # what is wrapped by an adapter
B_BIAS = ".lora_B.bias"
MAGNITUDE = ".lora_magnitude_vector"
# PEFT saves the weights of an embedding that is targeted by one of these names beside its A and B.
SAVED_BY_NAME = ("embed_tokens", "lm_head")
# What the modules are called whose weight a model's head may share: of embeddings, then of heads.
SHARED = re.compile(
    r"(^|[._])(embed_tokens|embed_in|wte|word_embeddings?|tokens?_embed|tok_embeddings|shared"
    r"|lm_head|lm_head\.decoder|cls\.predictions\.decoder|embed_out|proj_out|output_projection"
    r"|generator_lm_head|lm_loss|pred_layer\.proj|output)$"
)
# PEFT lists these for every sequence classifier, whatever its head is called.
HEADS = ("classifier", "score")
FACTOR = re.compile(
    r"(?P<module>.+?)(?P<depth>(?:\.base_layer)*)"
    r"\.lora_(?:(?P<side>[AB])\.weight|embedding_(?P<table>[AB]))"
)
_FEATURES = {
    "original_module": "bias 'all' beside modules_to_save is not supported",
    "modules_to_save": "bias 'all' beside modules_to_save is not supported",
}


class Stored(NamedTuple):
    """A tensor of the file, which is not read yet."""

    key: str
    dtype: str
    shape: tuple[int, ...]


class Pair(NamedTuple):
    """A and B of one parameter of `module`, which the file does not name.

    Attributes:
        module: the module.
        depth: how many pairs are wrapped around it.
        table: whether the module is an embedding.
        a: A.
        b: B.
        m: the magnitudes of DoRA, or None.
    """

    module: str
    depth: int
    table: bool
    a: Stored
    b: Stored
    m: Stored | None = None


class Part(NamedTuple):
    """A and B of one parameter, in PEFT's layout.

    Attributes:
        name: PyTorch's parameter.
        kind: `linear`, `embedding`, `conv` or `experts`.
        key: what patterns match: the module, or the parameter where it is chosen by its name.
        a: PEFT's A, an array or `Stored`.
        b: PEFT's B.
        scale: s.
        transposed: whether PyTorch keeps the weight as (inputs, outputs); None if not known.
        m: PEFT's magnitudes of DoRA, or None.
    """

    name: str
    kind: str
    key: str
    a: Any
    b: Any
    scale: float
    transposed: bool | None = None
    m: Any = None

    @property
    def arrays(self) -> tuple[Any, ...]:
        """A and B, and the magnitudes if there are any."""
        return (self.a, self.b) if self.m is None else (self.a, self.b, self.m)


class Adapter(NamedTuple):
    """An adapter in PEFT's files.

    Attributes:
        fields: its configuration.
        selection: what that says of a module.
        pairs: by module, the pair of its first parameter first.
        full: parameters that are replaced.
        frozen: parameters that the base must have just so.
        biases: what `lora_bias` adds to the outputs of a module, times s, by the bias.
        tokens: rows of embeddings that are replaced, by the embedding.
        heads: what lists the rows of an embedding once more, as they are those of its tied head.
        wrong: what is wrong with it.
        idle: what of its configuration names nothing, as PEFT takes it.
    """

    fields: dict[str, Any]
    selection: Selection
    pairs: dict[str, list[Pair]]
    full: dict[str, Stored]
    frozen: dict[str, Stored]
    biases: dict[str, Stored]
    tokens: dict[str, Tokens]
    heads: list[str]
    wrong: list[str]
    idle: list[str]


def parse(fields: dict[str, Any], tensors: Iterable[Stored], what: str) -> Adapter:
    """What each of the `tensors` is, by the checked `fields` of what the user calls `what`."""
    selection, wrong = Selection(fields, what), list[str]()
    if fields.get("peft_type") == ROWS_ALONE:
        tokens = _rows_alone(selection, tensors, wrong)
        return Adapter(fields, selection, {}, {}, {}, {}, tokens, [], wrong, [])
    sides: dict[tuple[str, int, bool], dict[str, Stored]] = {}
    magnitudes, deltas, others = dict[str, Stored](), dict[str, Stored](), list[Stored]()
    for x in tensors:
        if not x.key.startswith(PREFIX):
            wrong.append(f"{shown(x.key)}: unexpected; PEFT's keys start with {PREFIX!r}")
        elif x.dtype not in (COUNTS if x.key.endswith(COUNT) else DTYPES):
            wrong.append(f"{shown(x.key)}: expected a floating-point dtype, got {x.dtype}")
        elif found := FACTOR.fullmatch(x.key.removeprefix(PREFIX)):
            module, depth, side, table = found.group("module", "depth", "side", "table")
            place = module, depth.count("."), bool(table)
            sides.setdefault(place, {})[side or table] = x
        elif x.key.endswith(MAGNITUDE):
            magnitudes[x.key.removeprefix(PREFIX).removesuffix(MAGNITUDE)] = x
        elif x.key.endswith(DELTA):
            deltas[x.key.removeprefix(PREFIX).removesuffix(DELTA)] = x
        else:
            others.append(x)
    modules = {module for module, *_ in sides}
    selection.prepare(modules)
    full, frozen, biases = dict[str, Stored](), dict[str, Stored](), dict[str, Stored]()
    for x in others:
        module, _, parameter = x.key.removeprefix(PREFIX).rpartition(".")
        if fields.get("lora_bias") and x.key.endswith(B_BIAS):
            biases[x.key.removeprefix(PREFIX).removesuffix(B_BIAS) + ".bias"] = x
            continue
        inner = module.removesuffix(BASE).removesuffix(WRAPPED)
        name = f"{inner}.{parameter}"
        feature = next((f"; {what}" for part, what in _FEATURES.items() if part in x.key), "")
        if name in full or name in frozen:
            wrong.append(f"{shown(x.key)}: there twice, with and without {BASE[1:]}")
        elif inner != module and _is_frozen(selection, inner, parameter, {*modules, *deltas}):
            frozen[name] = x
        elif inner == module and _is_of_vocabulary(inner, parameter) and inner not in modules:
            full[name] = x
        elif feature or not _is_full(selection, inner, parameter, inner in modules):
            wrong.append(f"{shown(x.key)}: unexpected{feature}")
        elif inner in modules and parameter != "bias":
            wrong.append(f"{shown(x.key)}: in full, beside A and B of {shown(inner)}")
        else:
            full[name] = x
    pairs = _pairs(sides, wrong)
    if fields.get("use_dora"):
        pairs = _decomposed(pairs, magnitudes, wrong)
    else:
        why = f"unexpected; {CONFIG} has no use_dora"
        wrong += [f"{shown(x.key)}: {why}" for x in magnitudes.values()]
    rows, heads = told(fields, deltas, wrong)
    for module in rows:
        if module in modules or selection.saves(module):
            wrong.append(f"{shown(deltas[module].key)}: rows of what is adapted as a whole too")
    tokens = {f"{module}.weight": Tokens(module, rows[module], deltas[module]) for module in rows}
    return Adapter(fields, selection, pairs, full, frozen, biases, tokens, heads, wrong, [])


def _rows_alone(
    selection: Selection, tensors: Iterable[Stored], wrong: list[str]
) -> dict[str, Tokens]:
    """The rows of an adapter of nothing else."""
    rows, found = tuple(selection.fields["token_indices"]), dict[str, Tokens]()
    by_module = {x.key.removeprefix(PREFIX).removesuffix(DELTA_ALONE): x for x in tensors}
    if len(by_module) > PARAMETERS:
        wrong.append(
            f"{TENSORS} has rows of {len(by_module)} modules; expected {PARAMETERS} or fewer"
        )
        return {}
    selection.prepare(by_module)
    selected = list(filter(selection.adapts, by_module))
    for module, x in by_module.items():
        # PEFT stores a head that is tied to an embedding beside that, selected or not.
        is_taken = module in selected or (selected and SHARED.search(module))
        if x.key != f"{PREFIX}{module}{DELTA_ALONE}" or not is_taken:
            wrong.append(f"{shown(x.key)}: unexpected; {CONFIG} does not select it")
        elif x.dtype not in DTYPES:
            wrong.append(f"{shown(x.key)}: expected a floating-point dtype, got {x.dtype}")
        else:
            found[f"{module}.weight"] = Tokens(module, rows, x)
    return found


def _is_frozen(selection: Selection, module: str, parameter: str, adapted: Collection[str]) -> bool:
    """Whether a parameter that an adapter wraps is that of the base: of embeddings and heads."""
    is_own = parameter == "bias" and not _is_full(selection, module, parameter, True)
    return module in adapted and (parameter == "weight" or is_own)


def _is_of_vocabulary(module: str, parameter: str) -> bool:
    """Whether PEFT saves a parameter by itself, once the vocabulary has been resized."""
    return parameter in ("weight", "bias") and bool(SHARED.search(module))


def resized(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> str | None:
    """Why a parameter in full does not fit, if it is of a vocabulary of another size."""
    module, _, parameter = name.rpartition(".")
    if shape == wanted or shape[1:] != wanted[1:] or not _is_of_vocabulary(module, parameter):
        return None
    n = shape[0]
    return (
        f"{shown(name)}: has {n} rows in the adapter, which was saved with a resized vocabulary, "
        f"and {wanted[0]} in the base; resize that too, by resize_token_embeddings({n}) in "
        "`transformers`, and save it. The values of all rows are in the adapter"
    )


def _is_full(selection: Selection, module: str, parameter: str, adapted: bool) -> bool:
    bias = selection.fields.get("bias", "none")
    by_bias = parameter == "bias" and (bias == "all" or (bias == "lora_only" and adapted))
    return by_bias or selection.saves(module) or may_tie(selection.fields, module)


def may_tie(fields: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT may have changed `module` because it shares its weight with another."""
    return bool(fields.get("ensure_weight_tying")) and bool(SHARED.search(module))


def _pairs(
    sides: Mapping[tuple[str, int, bool], Mapping[str, Stored]], wrong: list[str]
) -> dict[str, list[Pair]]:
    """What has both an A and a B of some rank; of other modules none."""
    found: dict[str, list[Pair]] = {module: [] for module, *_ in sides}
    for (module, depth, table), pair in sorted(sides.items(), key=lambda x: -x[0][1]):
        key = PREFIX + module + BASE * depth
        end = "lora_embedding_{}" if table else "lora_{}.weight"
        lost = [f"{shown(key)}.{end.format(side)}" for side in "AB" if side not in pair]
        shapes = tuple(pair[side].shape for side in sorted(pair))
        if lost:
            [there] = pair.values()
            wrong.append(f"{lost[0]}: missing, though {shown(there.key)} is there")
        elif min(map(len, shapes)) < 2:
            wrong.append(f"{shown(key)}: expected matrices as A and B, got shapes {shapes}")
        else:
            found[module].append(Pair(module, depth, table, pair["A"], pair["B"]))
    return found


def _decomposed(
    pairs: Mapping[str, list[Pair]], magnitudes: Mapping[str, Stored], wrong: list[str]
) -> dict[str, list[Pair]]:
    """The pairs with their magnitudes, which each has."""
    for module, x in magnitudes.items():
        if module not in pairs:
            wrong.append(f"{shown(x.key)}: unexpected; there is no A and B of {shown(module)}")
    for module, each in pairs.items():
        if each and module not in magnitudes:
            key = f"{shown(PREFIX + module)}{MAGNITUDE}"
            wrong.append(f"{key}: missing, though {shown(each[0].a.key)} is there")
    return {m: [pair._replace(m=magnitudes.get(m)) for pair in each] for m, each in pairs.items()}
