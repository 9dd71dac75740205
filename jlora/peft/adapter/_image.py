"""Image LoRA: the files of diffusers and of kohya's scripts, translated to PEFT's and back.

One file holds A and B of one or several models, each under a prefix. PEFT's configuration is in the
header, or else follows from the shapes and alphas.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..._errors import InputError, Problem, list_few, show
from .._file import COUNTS, DTYPES, PREFIX, TensorInfo
from .._problems import About
from .._recognized import ALPHA, BIAS, CONFIG, FORMS, KEY, MAGNITUDES, MANGLED, TENSORS, A
from ._files import Files
from ._patterns import list_parents, make_scales

FIELDS = "lora_adapter_metadata"  # of the header, with LoraConfig's fields by prefix
# The models of a pipeline, in files whose header does not name them.
_MODEL = re.compile(
    r"(?P<prefix>(?:unet|transformer|text_encoder|prior|diffusion_model)(?:_\d+)?)\..+"
)
# The modules of CLIP's text encoder, which transformers 5 no longer has in a `text_model`.
_CLIP = re.compile(r"(encoder\.layers|embeddings|final_layer_norm)\b")
# Methods of LyCORIS and PEFT, by a part of their keys, with a dot after these.
_OTHERS = {
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.oft_": "OFT, or BOFT",
    r"\.boft_": "BOFT",
    r"\.[ab][12]\.weight\.": "GLoRA",
    r"\.(on_input|ia3_l)\.": "IA3",
    r"\.lora_mid\.": "LoCon with a core between A and B",
    r"\.diff\.|\.w_norm\.": "a difference of all weights",
    r"\.diff_b\.|\.b_norm\.": "a difference of all biases",
}
_ORIGINAL = (
    "If these are names of the model's first implementation, such as input_blocks or double_blocks,"
    " load the file with load_lora_weights of diffusers, and save it with save_lora_adapter of the "
    "model."
)
_MERGE = "jlora reads LoRA and DoRA: merge others with the tool that wrote them."
_RESAVE = (
    "Expected names of modules, or names with _ for dots after lora_unet_, lora_te1_ or lycoris_, "
    f"whose A ends in {', '.join(next(iter(ends)) for ends in FORMS.values())}. Load other files "
    "with load_lora_weights of diffusers, and save them with save_lora_adapter of the model."
)


class _Entry(NamedTuple):
    """A tensor of a file, with the module and the end of its key."""

    module: str
    end: str
    tensor: TensorInfo

    @property
    def is_mangled(self) -> bool:
        """Whether the module has _ for dots."""
        return bool(MANGLED.fullmatch(self.module))


def decode(
    files: Files,
    fields: Mapping[str, Any],
    where: str,
    prefix: str | None,
    modules: Collection[str],
) -> Files:
    """Translates a file to PEFT's keys and configuration.

    Args:
        files: its tensors.
        fields: the configurations in its header.
        where: what errors call it.
        prefix: which model's adapter to read; None for that of a single model.
        modules: the modules of the model, which kohya's names are matched to.
    """
    about = About(files.argument, f"{where} cannot be read; nothing was loaded.", where)
    configs = _split(fields)
    known = {*configs} if prefix is None else {*configs, prefix}
    groups = dict[str, list[_Entry]]()
    for x in _parse_keys(files, about):
        groups.setdefault(_find_prefix(x, known), []).append(x)
    prefix = _choose(groups, prefix, about)
    own = groups[prefix]
    form = _find_form(own, about)
    names = _name_modules(own, prefix, modules, about)
    sides = {end: dict[str, TensorInfo]() for end in FORMS["diffusers"]}
    wrong = list[Problem]()
    for x in own:
        if sides[form[x.end]].setdefault(names[x.module], x.tensor) is not x.tensor:
            wrong.append(Problem(x.tensor.key, f"a duplicate of {show(names[x.module])}"))
    alphas = sides.pop(ALPHA)
    own_fields = configs.get(prefix)
    if own_fields is None:
        # The header may hold the scale of these tensors under a misspelled prefix. The scale that
        # shapes give would then be wrong.
        why = f"is in {FIELDS} of the header, but no key begins with it"
        wrong += [Problem(show(repr(p)), why) for p in sorted(configs.keys() - groups.keys())]
        own_fields = _infer_fields(sides, _read_alphas(files, alphas, sides[A], wrong))
    else:
        why = f"unexpected beside {FIELDS} in the header, which has the alphas"
        wrong += [Problem(x.key, why) for x in alphas.values()]
    about.stop(wrong)
    if form is FORMS["kohya"]:
        sides[MAGNITUDES] = _shape_magnitudes(sides)
    fields = {"peft_type": "LORA", "target_modules": [*names.values()]} | own_fields
    keys = {f"{PREFIX}{name}": module for module, name in names.items()}
    keys |= {f"{ours}.{end}": f"{x}.{e}" for ours, x in keys.items() for e, end in form.items()}
    keys |= {CONFIG: "the configuration", TENSORS: "the file"}  # in errors
    found = [
        x._replace(key=f"{PREFIX}{name}.{end}")
        for end, each in sides.items()
        for name, x in each.items()
    ]
    given = {x.key: x for x in files.tensors}

    def read(wanted: Iterable[TensorInfo]) -> dict[str, np.ndarray]:
        wanted = [*wanted]
        values = files.read([given[keys[x.key]] for x in wanted])
        return {x.key: values[keys[x.key]].reshape(x.shape) for x in wanted}

    return files._replace(fields=fields, tensors=found, read=read, keys=keys)


def _refuse(about: About, why: str, problems: Iterable[Problem] = ()) -> InputError:
    """Makes an error about the file as a whole."""
    return InputError(about.argument, f"{about.path} {why}", path=about.path, problems=problems)


def _parse_keys(files: Files, about: About) -> list[_Entry]:
    """Splits all keys; raises for keys of other methods, and unknown ones."""
    each = [(KEY.fullmatch(x.key), x) for x in files.tensors]
    about.stop(_explain_key(x.key) for key, x in each if not key)
    if not each:
        raise _refuse(about, "has no tensors.")
    return [_Entry(key["module"], key["end"], x) for key, x in each if key]


def _explain_key(key: str) -> Problem:
    method = next((x for part, x in _OTHERS.items() if re.search(part, f"{key}.")), "")
    if method:
        return Problem(key, f"is {method}, which jlora does not read", _MERGE)
    return Problem(key, "unexpected", _RESAVE)


def _find_form(entries: Iterable[_Entry], about: About) -> Mapping[str, str]:
    """Finds the one of `FORMS` that all keys have; raises if there is none, or some are mangled."""
    kinds = {(x.end, x.is_mangled): x.tensor.key for x in entries}
    ends = {end for end, _ in kinds}
    found = next((form for form in FORMS.values() if ends <= form.keys()), None)
    if found is None or len({is_mangled for _, is_mangled in kinds}) > 1:
        why = "mixes what keys of different tools are like. Save each by itself."
        raise _refuse(
            about, why, [Problem(key, f"ends in {end}") for (end, _), key in kinds.items()]
        )
    return found


def _split(fields: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Splits the fields in a header by prefix."""
    found = dict[str, dict[str, Any]]()
    for key, x in fields.items():
        prefix, _, field = key.rpartition(".")
        found.setdefault(prefix, {})[field] = x
    return found


def _find_prefix(x: _Entry, known: Collection[str]) -> str:
    """Finds the prefix of a key: a `known` one, or else a component of a pipeline."""
    pattern = MANGLED if x.is_mangled else _MODEL
    found = None if "" in known else pattern.fullmatch(x.module)
    parents = list_parents(x.module.rpartition(".")[0])
    return next((p for p in parents if p in known), found["prefix"] if found else "")


def _choose(groups: Collection[str], prefix: str | None, about: About) -> str:
    """Chooses the prefix of one model."""
    listed = list_few([show(repr(x)) for x in sorted(groups)], 9)
    if prefix is None and len(groups) > 1:
        why = f"has adapters of several models. Give `prefix`, one of {listed}, and read each."
        raise _refuse(about, why)
    chosen = next(iter(groups)) if prefix is None else prefix
    if chosen not in groups:
        raise InputError("prefix", f"must be in the file, one of {listed}; got {chosen!r}.")
    return chosen


def _name_modules(
    entries: Collection[_Entry], prefix: str, modules: Collection[str], about: About
) -> dict[str, str]:
    """Names modules as the model does; kohya's names stay as they are without a model."""
    found = dict.fromkeys(x.module for x in entries)
    is_mangled = next(iter(entries)).is_mangled
    dialect = "kohya" if is_mangled else "diffusers"
    known = dict[str, list[str]]()
    for name in modules:
        if (spelled := spell(dialect, prefix, name)) in found:
            known.setdefault(spelled, []).append(name)
    if not is_mangled:
        start = len(prefix) + 1 if prefix else 0
        return {module: known[module][0] if module in known else module[start:] for module in found}
    wrong = [
        Problem(key, f"may be {' or '.join(map(show, sorted(own)))}, as kohya writes dots as _")
        for key, own in known.items()
        if len(own) > 1
    ]
    lost = [module for module in found if modules and module not in known]
    why = "no module of the model has this name with _ for dots"
    about.stop(wrong or [Problem(module, why, _ORIGINAL) for module in lost])
    return {module: known[module][0] if known else module for module in found}


def _shape_magnitudes(sides: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """Gives kohya's magnitudes, (outputs, 1, …), PEFT's shapes; others stay, and will not fit."""
    found = dict[str, TensorInfo]()
    for name, x in sides[MAGNITUDES].items():
        n, *ones = x.shape or (0,)
        shape = (n,) if len(ones) == 1 else (1, n, *ones[1:])
        found[name] = x.reshape(shape) if {*ones} == {1} else x
    return found


def _read_alphas(
    files: Files,
    alphas: Mapping[str, TensorInfo],
    factors: Mapping[str, TensorInfo],
    wrong: list[Problem],
) -> dict[str, float]:
    """Reads the alphas of modules."""
    fitting = dict[str, TensorInfo]()
    for name, x in alphas.items():
        if name not in factors:
            wrong.append(Problem(x.key, "has no A and B"))
        elif x.dtype not in DTYPES | COUNTS or np.prod(x.shape) != 1:
            wrong.append(Problem(x.key, f"expected one number, got {x.dtype} of shape {x.shape}"))
        else:
            fitting[name] = x
    values = files.read(fitting.values())
    return {name: float(values[x.key].reshape(())) for name, x in fitting.items()}


def _infer_fields(
    sides: Mapping[str, Mapping[str, TensorInfo]], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """Makes a configuration from ranks and alphas; without an alpha it is the rank."""
    ranks = {name: x.shape[0] for name, x in sides[A].items() if x.shape}
    if not ranks:
        return {}
    each = {name: alphas.get(name, rank) for name, rank in ranks.items()}
    methods = {"use_dora": bool(sides[MAGNITUDES]), "lora_bias": bool(sides[BIAS])}
    return make_scales(ranks, each) | methods


def spell(dialect: str, prefix: str, name: str) -> str:
    """Returns a module's name as keys of a dialect have it."""
    if prefix.startswith("te") and _CLIP.match(name):
        name = f"text_model.{name}"
    if dialect == "diffusers":
        return f"{prefix}.{name}" if prefix else name
    if MANGLED.fullmatch(name):
        return name
    start = prefix if prefix == "lycoris" else f"lora_{prefix}"
    return f"{start}_{name.replace('.', '_')}"
