"""Image LoRA: the files of diffusers and of kohya's scripts, translated to PEFT's and back.

One file holds A and B of one or several models, each under a prefix. PEFT's configuration is in the
header, or else follows from the shapes and alphas.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..._errors import InputError, Problem, blame
from .._file import (
    CONFIG,
    COUNTS,
    DTYPES,
    PREFIX,
    TENSORS,
    Source,
    TensorInfo,
    parse,
    read_header,
    read_tensors,
    show,
)
from .._recognized import IMAGE
from ._config import DEFAULTS, LIMIT, leave_out
from ._describe import find_alpha, find_common
from ._files import Files, open_files
from ._sorted import Parameters

DIALECTS = ("peft", "diffusers", "kohya")
FIELDS = "lora_adapter_metadata"  # of the header, with LoraConfig's fields by prefix
ALPHA, MAGNITUDES, BIAS = "alpha", "lora_magnitude_vector", "lora_B.bias"
A, B = "lora_A.weight", "lora_B.weight"
# What keys end in, in each dialect, and what that is in PEFT's.
_ENDS = {
    "diffusers": {end: end for end in (A, B, BIAS, MAGNITUDES, ALPHA)},
    "kohya": {
        "lora_down.weight": A,
        "lora_up.weight": B,
        "dora_scale": MAGNITUDES,
        ALPHA: ALPHA,
    },
}
_MANGLED = re.compile(r"lora_(?P<prefix>[A-Za-z]+\d*)_[^.]+")
# The models of a pipeline, in files whose header does not name them.
_MODEL = re.compile(r"(?P<prefix>(?:unet|transformer|text_encoder|prior)(?:_\d+)?)\..+")
# Methods of LyCORIS, by a part of their keys.
_OTHERS = {
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".lora_mid.": "LoCon with a core between A and B",
    ".oft_": "OFT",
    ".diff": "a difference of all weights",
    ".w_norm": "a norm in full",
    ".b_norm": "a norm in full",
}
_MERGE = "jlora reads LoRA and DoRA: merge others with the tool that wrote them."
_RESAVE = (
    "Expected PEFT's names, as diffusers saves them (….lora_A.weight, ….lora_B.weight), or kohya's "
    "(lora_unet_….lora_down.weight, .lora_up.weight, .alpha, .dora_scale). Load other files with "
    "load_lora_weights of diffusers, and save them with save_lora_adapter of the model."
)


class Image(NamedTuple):
    """One file with adapters of the models of a pipeline.

    Attributes:
        tensors: its tensors.
        metadata: the texts in its header.
        read: a function that reads the values of some tensors, by key.
        where: the file, for errors.
        argument: the user's argument with it.
        is_own: as in `Files`.
    """

    tensors: Sequence[TensorInfo]
    metadata: Mapping[str, str]
    read: Callable[[Iterable[TensorInfo]], dict[str, np.ndarray]]
    where: str
    argument: str
    is_own: bool = False

    def refuse(self, why: str, problems: Sequence[Problem] = (), remedy: str = "") -> InputError:
        """Makes an error about the file."""
        text = f"`{self.argument}`: {self.where} {why}"
        return InputError(text, path=self.where, problems=problems, remedy=remedy)


class _Entry(NamedTuple):
    """A tensor of a file: its dialect, the module as the key has it, and PEFT's end of the key."""

    dialect: str
    module: str
    end: str
    tensor: TensorInfo


def open_adapter(
    path: str | os.PathLike[str],
    argument: str,
    ignore: Collection[str],
    prefix: str | None,
    modules: Collection[str] = (),
) -> Files:
    """Opens an adapter in any dialect.

    Args:
        path: PEFT's folder, a file of another dialect, or a folder with `IMAGE`.
        argument: the user's argument with it, for errors.
        ignore: fields of the configuration to leave out.
        prefix: which model's adapter to read; None for that of a single model.
        modules: the modules of the model, which kohya's names are matched to.
    """
    path = Path(path)
    source, name = Source(path, argument), IMAGE
    is_file = path.suffix == ".safetensors" and path.name != TENSORS and not path.is_dir()
    if is_file:
        source, name = Source(path.parent, argument), path.name
    elif not (path / IMAGE).exists():
        if prefix is not None:
            raise InputError(
                f"`prefix` chooses from the models in a file of diffusers or kohya, but {path} has "
                f"no {IMAGE}; got {prefix!r}. Leave it out, or give such a file.",
            )
        return open_files(source, ignore)
    elif found := [x for x in (CONFIG, TENSORS) if (path / x).exists()]:
        why = f"has two adapters: {found[0]}, and {IMAGE}. Give the file that you mean, or move it."
        raise InputError(f"`{argument}`: {path} {why}", path=path)
    header = read_header(source, name)
    read = lambda wanted: read_tensors(source, header, wanted, name)  # noqa: E731
    tensors = [*header.entries.values()]
    image = Image(tensors, header.metadata, read, str(source.folder / name), argument)
    return decode(image, ignore, prefix, modules)


# ----------------------------------------------------------------------------------------- reading


def decode(
    image: Image, ignore: Collection[str], prefix: str | None, modules: Collection[str]
) -> Files:
    """Translates a file to PEFT's keys and configuration; see `open_adapter`."""
    entries = _parse_keys(image)
    configs = _parse_configs(image)
    groups = dict[str, list[_Entry]]()
    for x in entries:
        groups.setdefault(_find_prefix(x, configs), []).append(x)
    own, prefix = _choose(image, groups, prefix)
    dialect = own[0].dialect
    names = _name_modules(image, own, prefix, modules)
    sides = {end: dict[str, TensorInfo]() for end in _ENDS["diffusers"]}
    for x in own:
        sides[x.end][names[x.module]] = x.tensor
    alphas = sides.pop(ALPHA)
    fields = configs.get(prefix, {})
    wrong = [
        Problem(x.key, f"unexpected beside {FIELDS}, which has the alphas")
        for x in (alphas.values() if fields else ())
    ]
    found, originals = list[TensorInfo](), dict[str, TensorInfo]()
    for end, each in sides.items():
        for name, x in each.items():
            shape = x.shape
            if dialect == "kohya" and end == MAGNITUDES and name in sides[B]:
                shape = _shape_magnitudes(x, sides[B][name].shape, wrong)
            found.append(x._replace(key=f"{PREFIX}{name}.{end}", shape=shape))
            originals[found[-1].key] = x
    numbers = {} if fields else _read_alphas(image, alphas, sides[A], wrong)
    if wrong:
        raise image.refuse("cannot be read; nothing was loaded.", wrong)
    fields = {"peft_type": "LORA", "target_modules": [*names.values()]} | (
        fields or _infer_fields(sides, numbers)
    )
    keys = {
        f"{PREFIX}{names[x.module]}.{end}": f"{x.module}.{e}"
        for x in own
        for e, end in _ENDS[dialect].items()
    }

    def read(wanted: Iterable[TensorInfo]) -> dict[str, np.ndarray]:
        wanted = [*wanted]
        values = image.read([originals[x.key] for x in wanted])
        return {x.key: values[originals[x.key].key].reshape(x.shape) for x in wanted}

    fields = leave_out(fields, ignore)
    return Files(fields, found, read, image.argument, image.is_own, keys)


def _parse_keys(image: Image) -> list[_Entry]:
    """Splits all keys; raises for keys of other methods, unknown ones, and mixed dialects."""
    found, wrong = list[_Entry](), list[Problem]()
    for x in image.tensors:
        if entry := _parse_key(x):
            found.append(entry)
        elif method := next((name for part, name in _OTHERS.items() if part in x.key), None):
            wrong.append(Problem(x.key, f"is {method}, which jlora does not read", _MERGE))
        else:
            wrong.append(Problem(x.key, "unexpected", _RESAVE))
    if wrong or not found:
        raise image.refuse("cannot be read; nothing was loaded.", wrong, "" if wrong else _RESAVE)
    first = {x.dialect: x.tensor.key for x in reversed(found)}
    if len(first) > 1:
        each = [Problem(key, f"a key of {dialect}") for dialect, key in sorted(first.items())]
        raise image.refuse("mixes two dialects.", each, "Save each by itself.")
    return found


def _parse_key(x: TensorInfo) -> _Entry | None:
    for dialect, ends in _ENDS.items():
        for end, ours in ends.items():
            module = x.key.removesuffix(f".{end}")
            is_mangled = bool(_MANGLED.fullmatch(module))
            if module != x.key and is_mangled == (dialect == "kohya"):
                return _Entry(dialect, module, ours, x)
    return None


def _parse_configs(image: Image) -> dict[str, dict[str, Any]]:
    """Parses the configurations in the header, by prefix."""
    text = image.metadata.get(FIELDS)
    if text is None:
        return {}
    with blame(image.argument, image.where, f"{FIELDS} in the header of "):
        if len(text) > LIMIT:
            raise ValueError(f"has {len(text)} characters; expected at most {LIMIT}")
        raw = parse(text.encode())
    found = dict[str, dict[str, Any]]()
    for key, x in raw.items():
        prefix, _, field = key.rpartition(".")
        found.setdefault(prefix, {})[field] = x
    return found


def _find_prefix(x: _Entry, configs: Collection[str]) -> str:
    """Finds the prefix of a key: of those in the header, or else a component of a pipeline."""
    if x.dialect == "kohya" or not configs:
        found = (_MANGLED if x.dialect == "kohya" else _MODEL).fullmatch(x.module)
        return found["prefix"] if found else ""
    fits = [p for p in configs if p and x.module.startswith(f"{p}.")]
    found = _MODEL.fullmatch(x.module) if "" not in configs else None
    return max(fits, key=len, default=found["prefix"] if found else "")


def _choose(
    image: Image, groups: Mapping[str, list[_Entry]], prefix: str | None
) -> tuple[list[_Entry], str]:
    """Chooses the entries of one model."""
    listed = ", ".join(show(repr(x)) for x in sorted(groups))
    if prefix is None and len(groups) > 1:
        raise image.refuse(
            f"has adapters of several models. Give `prefix`, one of {listed}, and read each."
        )
    chosen = next(iter(groups)) if prefix is None else prefix
    if chosen not in groups:
        raise InputError(
            f"`prefix` must be one of the prefixes in {image.where}, {listed}; got {chosen!r}.",
        )
    return groups[chosen], chosen


def _name_modules(
    image: Image, entries: Iterable[_Entry], prefix: str, modules: Iterable[str]
) -> dict[str, str]:
    """Names modules as the model does; kohya's names stay as they are if the model has none."""
    found = dict.fromkeys(x.module for x in entries)
    if next(iter(entries)).dialect == "diffusers":
        return {module: module[len(prefix) + 1 :] if prefix else module for module in found}
    known = dict[str, list[str]]()
    for name in modules:
        if (spelled := spell("kohya", prefix, name)) in found:
            known.setdefault(spelled, []).append(name)
    twice = [
        Problem(key, f"may be {' or '.join(map(show, own))}, as kohya writes dots as _")
        for key, own in known.items()
        if len(own) > 1
    ]
    if twice:
        raise image.refuse("has ambiguous names.", twice, "Save it in the dialect of diffusers.")
    return {module: known[module][0] if module in known else module for module in found}


def _shape_magnitudes(x: TensorInfo, b: tuple[int, ...], wrong: list[Problem]) -> tuple[int, ...]:
    """Returns PEFT's shape of kohya's magnitudes, of which there is one for each output."""
    if not b or x.shape != (b[0], *[1] * (len(b) - 1)):
        expected = (*b[:1], *[1] * (len(b) - 1))
        why = f"expected shape {expected}, one number for each output; got {x.shape}"
        wrong.append(Problem(x.key, why))
        return x.shape
    return b[:1] if len(b) == 2 else (1, *x.shape[:1], *x.shape[2:])


def _read_alphas(
    image: Image,
    alphas: Mapping[str, TensorInfo],
    factors: Mapping[str, TensorInfo],
    wrong: list[Problem],
) -> dict[str, float]:
    """Reads the alphas of modules."""
    fitting = list[TensorInfo]()
    for name, x in alphas.items():
        if name not in factors:
            wrong.append(Problem(x.key, "has no A and B"))
        elif x.dtype not in DTYPES | COUNTS or np.prod(x.shape) != 1:
            wrong.append(Problem(x.key, f"expected one number, got {x.dtype} of shape {x.shape}"))
        else:
            fitting.append(x)
    values = image.read(fitting)
    found = dict[str, float]()
    for name, x in alphas.items():
        if x.key in values:
            found[name] = number = float(values[x.key].reshape(()))
            if not np.isfinite(number):
                wrong.append(Problem(x.key, f"expected a finite number, got {number}"))
    return found


def _infer_fields(
    sides: Mapping[str, Mapping[str, TensorInfo]], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """Makes a configuration from ranks and alphas; without an alpha it is the rank."""
    ranks = {name: x.shape[0] for name, x in sides[A].items() if x.shape}
    if not ranks:
        return {}
    each = {name: alphas.get(name, rank) for name, rank in ranks.items()}
    r, rank_pattern = find_common(ranks)
    alpha, alpha_pattern = find_common(each)
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_dora": bool(sides[MAGNITUDES]),
        "lora_bias": bool(sides[BIAS]),
    }


# ----------------------------------------------------------------------------------------- writing


def check_dialect(dialect: str, prefix: str | None) -> str:
    """Returns the prefix to write; raises for an unknown dialect, or a prefix that cannot be."""
    if dialect not in DIALECTS:
        listed = ", ".join(map(repr, DIALECTS))
        raise InputError(f"`dialect` must be one of {listed}; got {dialect!r}.")
    if dialect == "peft" and prefix is not None:
        raise InputError(f"`prefix` is for other dialects than 'peft'; got {prefix!r}.")
    if dialect == "diffusers" and prefix is None:
        raise InputError(
            "`prefix` must be the model's name in its pipeline for dialect 'diffusers', such as "
            "'unet' or 'transformer', or '' for load_lora_adapter(..., prefix=None); got None.",
        )
    if dialect == "kohya" and not _MANGLED.fullmatch(f"lora_{prefix or 'unet'}_x"):
        why = "such as 'unet', 'te1' or 'transformer', for dialect 'kohya'"
        raise InputError(f"`prefix` must be letters and digits, {why}; got {prefix!r}.")
    return prefix or ("unet" if dialect == "kohya" else "")


def spell(dialect: str, prefix: str, name: str) -> str:
    """Returns a module's name as keys of a dialect have it."""
    if dialect == "diffusers":
        return f"{prefix}.{name}" if prefix else name
    return name if _MANGLED.fullmatch(name) else f"lora_{prefix}_{name.replace('.', '_')}"


def encode(
    dialect: str, prefix: str, fields: Mapping[str, Any], own: Parameters
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Translates an adapter: the texts of the header, and the tensors.

    Raises:
        ValueError: if the dialect has no form for a part, or one name for two modules.
    """
    wrong = [Problem(name, "trained in full") for name in (own.full | own.frozen)]
    wrong += [Problem(x.module, "rows of an embedding") for x in own.tokens.values()]
    odd = (x for x in own.parts if x.kind not in ("linear", "conv"))
    wrong += [Problem(x.key, f"of kind {x.kind}") for x in odd]
    names = dict[str, str]()
    for x in own.parts:
        spelled = spell(dialect, prefix, x.key)
        if names.setdefault(spelled, x.key) != x.key:
            why = f"would have the name of {names[spelled]}, {spelled}"
            wrong.append(Problem(x.key, why, "Save it in the dialect of diffusers."))
    if wrong:
        raise InputError(
            f"`dialect` {dialect!r} holds only LoRA of linear and convolutional sites; got:",
            problems=wrong,
        )
    found = dict[str, np.ndarray]()
    for x in own.parts:
        values = dict(zip((A, B, MAGNITUDES), x.arrays, strict=False))
        if dialect == "kohya":
            values[ALPHA] = _narrow(find_alpha(x.scale, x.rank))
            if x.m is not None:
                values[MAGNITUDES] = x.m.reshape(-1, *[1] * (x.a.ndim - 1))
        name = spell(dialect, prefix, x.key)
        each = {end: values[ours] for end, ours in _ENDS[dialect].items() if ours in values}
        found |= {f"{name}.{end}": y for end, y in each.items()}
    metadata = {"format": "pt"}
    if dialect == "diffusers":
        kept = {k: x for k, x in fields.items() if k not in DEFAULTS or x != DEFAULTS[k]}
        kept |= {k: fields[k] for k in ("peft_type", "r", "lora_alpha", "target_modules")}
        own_fields = {spell(dialect, prefix, k): x for k, x in kept.items()}
        metadata[FIELDS] = json.dumps(own_fields, indent=2, sort_keys=True)
    return metadata, found


def _narrow(alpha: float) -> np.ndarray:
    """Makes a scalar of float32 if it is exact, else of float64."""
    narrow = np.asarray(alpha, np.float32)
    return narrow if float(narrow) == alpha else np.asarray(alpha, np.float64)


def refuse_mangled(names: Iterable[str]) -> None:
    """Raises for kohya's names, which other dialects cannot have."""
    if found := [Problem(x, "is kohya's") for x in names if _MANGLED.fullmatch(x)]:
        raise InputError(
            "`contents` has kohya's names, in which dots and _ are the same, so that only "
            "dialect 'kohya' can hold them:",
            problems=found,
            remedy="Load the file onto its model with jlora.peft.load, and save that.",
        )
