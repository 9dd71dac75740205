"""An adapter in memory, before it is written as PEFT's two files, or as one file of image LoRA."""

import json
import os
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..._errors import InputError, Problem, shorten, show, stop
from ..._folders import fresh, fresh_file
from .._file import make_header
from .._recognized import ALPHA, CONFIG, FORMS, IMAGE, MAGNITUDES, MANGLED, TENSORS, A, B
from ._arranged import make_tensors
from ._config import DEFAULTS, dumps
from ._describe import find_alpha
from ._files import Files, as_files, list_infos
from ._image import FIELDS, decode, spell
from ._parts import Values

_SAVE_FOR_IT = "save with dialect='diffusers' for it"
DIALECTS = ("peft", "diffusers", "kohya")


class Reader(NamedTuple):
    """A model whose modules ComfyUI reads in kohya's dialect by their names in diffusers.

    Attributes:
        model: the model.
        prefix: the prefix that it has there.
        outermost: its outermost modules, with spaces between.
        unread: a pattern of the modules that diffusers 0.42 does not read there.
    """

    model: str
    prefix: str
    outermost: str
    unread: str = "(?!)"


_TRANSFORMER = "time_text_embed transformer_blocks norm_out proj_out "
UNET = Reader(
    "a UNet",
    "unet",
    "conv_in time_embedding add_embedding class_embedding encoder_hid_proj down_blocks mid_block "
    "up_blocks conv_norm_out conv_out",
    "add_embedding",
)
READERS = (
    UNET,
    Reader("Qwen-Image", "unet", _TRANSFORMER + "txt_norm img_in txt_in"),
    Reader(
        "Flux",
        "transformer",
        _TRANSFORMER + "single_transformer_blocks x_embedder context_embedder",
        r"transformer_blocks\.\d+\.(?!attn\.)",
    ),
    Reader("SD 3", "transformer", _TRANSFORMER + "pos_embed context_embedder", ""),
)


class Draft(NamedTuple):
    """The contents of an adapter's files.

    Attributes:
        fields: the configuration.
        tensors: the tensors, by the keys of the dialect.
        metadata: the texts in the header of the one file; None for PEFT's two files.
        misread: what diffusers computes something else with; empty if nothing.
    """

    fields: dict[str, Any]
    tensors: dict[str, np.ndarray]
    metadata: Mapping[str, str] | None = None
    misread: str = ""

    def as_files(self, argument: str, modules: Collection[str]) -> Files:
        """Presents the draft as `open_adapter` would its files."""
        files = as_files(self.fields, self.tensors, argument)
        if self.metadata is None:
            return files
        fields = json.loads(self.metadata.get(FIELDS, "{}"))
        return decode(files, fields, "the file", None, modules)

    def write(self, out: str | os.PathLike[str]) -> None:
        """Writes the files to a new folder `out`, or to a new file in other dialects."""
        if self.misread:
            warnings.warn(f"{self.misread}; {_SAVE_FOR_IT}", stacklevel=3)
        if self.metadata is not None and Path(out).suffix == ".safetensors":
            with fresh_file(out, "out") as file:
                self._write_tensors(file)
            return
        with fresh(out, "out") as folder:
            self._write_tensors(folder / (TENSORS if self.metadata is None else IMAGE))
            if self.metadata is None:
                # As bytes, as text would get other line ends on Windows.
                (folder / CONFIG).write_bytes(dumps(self.fields).encode())

    def _write_tensors(self, path: Path) -> None:
        """Writes as safetensors does, which would write the texts of the header in any order."""
        header = make_header(list_infos(self.tensors), self.metadata or {})
        with open(path, "wb") as file:
            file.write(header.start)
            for key in header.entries:
                file.write(self.tensors[key].tobytes())


def make_draft(
    fields: dict[str, Any],
    own: Values,
    tied: Mapping[str, str],
    dialect: str,
    prefix: str | None,
    modules: Iterable[str],
) -> Draft:
    """Makes the files of an adapter in a dialect, for a model with some `modules`."""
    spelled = _check_dialect(dialect, prefix)
    mangled = _find_mangled((part.key for part in own.parts), dialect, prefix)
    if dialect == "peft":
        return Draft(fields, make_tensors(fields, own, tied))
    reader = None if mangled or dialect != "kohya" else _find_reader(prefix, modules)
    metadata, tensors = _encode(dialect, spelled, fields, own)
    return Draft(fields, tensors, metadata, _explain_misread(dialect, own, reader))


def _find_reader(prefix: str | None, modules: Iterable[str]) -> Reader | None:
    """Finds a model that has the `modules`; None for prefixes of other models, which none has.

    Without a prefix it is a UNet: the modules of an adapter may be of several transformers.
    """
    given = [x for x in READERS if x.prefix == prefix] if prefix else [UNET]
    names = sorted(modules)
    outermost = {name.partition(".")[0]: name for name in reversed(names)}
    found = next((x for x in given if outermost.keys() <= {*x.outermost.split()}), None)
    if found or not given:
        return found
    known = {x.prefix: [y.model for y in READERS if y.prefix == x.prefix] for x in READERS}
    listed = ", or ".join(f"{x!r} for {' and '.join(models)}" for x, models in known.items())
    odd = outermost[min(outermost.keys() - {*given[0].outermost.split()})]
    raise InputError(
        "prefix",
        f"must be {listed}, for dialect 'kohya'; got {prefix!r} for a model with {show(odd)}.",
        remedy="No tool is known to read other models there: save them with dialect='diffusers'.",
    )


def _explain_misread(dialect: str, own: Values, reader: Reader | None) -> str:
    """Says what diffusers 0.42 does not read in kohya's dialect."""
    if dialect != "kohya":
        return ""
    if any(x.m is not None for x in own.parts):
        return "diffusers ignores dora_scale, the magnitudes of DoRA, in kohya's files"
    if reader and (lost := [x.key for x in own.parts if re.search(reader.unread, x.key)]):
        these = f"{len(lost)} of {len(own.parts)} modules of {reader.model}, such as {lost[0]}"
        return f"diffusers does not read {these}, in kohya's files"
    alphas = {find_alpha(x.scale, x.rank) for x in own.parts}
    if len(alphas) < 2 or reader is not UNET:
        return ""
    where = "attention modules of a UNet, in kohya's files"
    return f"diffusers mistakes alphas that differ between {where}; got {shorten(sorted(alphas))}"


def _check_dialect(dialect: str, prefix: str | None) -> str:
    """Returns the prefix to write; raises for an unknown dialect, or a prefix that cannot be."""
    if dialect not in DIALECTS:
        listed = ", ".join(map(repr, DIALECTS))
        raise InputError("dialect", f"must be one of {listed}; got {dialect!r}.")
    if dialect == "peft" and prefix is not None:
        raise InputError("prefix", f"is for other dialects than 'peft'; got {prefix!r}.")
    if dialect == "diffusers" and prefix is None:
        raise InputError(
            "prefix",
            "must be the model's name in its pipeline for dialect 'diffusers', such as "
            "'unet' or 'transformer', or '' for load_lora_adapter(..., prefix=None); got None.",
        )
    found = MANGLED.fullmatch(f"lora_{prefix or 'unet'}_x")
    if dialect == "kohya" and (found is None or found["prefix"] != (prefix or "unet")):
        why = "such as 'unet', 'te1' or 'transformer', for dialect 'kohya'"
        raise InputError("prefix", f"must be letters and digits, {why}; got {prefix!r}.")
    return prefix or ("unet" if dialect == "kohya" else "")


def _encode(
    dialect: str, prefix: str, fields: Mapping[str, Any], own: Values
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Translates an adapter: the texts of the header, and the tensors.

    Raises:
        ValueError: if the dialect has no form for a part, or one name for two modules.
    """
    wrong = [Problem(name, "trained in full") for name in own.frozen]
    wrong += own.list_unheld(dialect)
    names = dict[str, str]()
    for x in own.parts:
        spelled = spell(dialect, prefix, x.key)
        if names.setdefault(spelled, x.key) != x.key:
            why = f"would have the name of {names[spelled]}, {spelled}"
            wrong.append(Problem(x.key, why, "Save it in the dialect of diffusers."))
    why = "holds only LoRA of linear and convolutional sites, each under a name of its own."
    stop(wrong, "dialect", f"{dialect!r} {why}")
    found = dict[str, np.ndarray]()
    for name, x in zip(names, own.parts, strict=True):
        values = dict[str, np.ndarray](zip((A, B, MAGNITUDES), x.arrays, strict=False))
        if dialect == "kohya":
            values[ALPHA] = _narrow(find_alpha(x.scale, x.rank))
            if x.m is not None:
                values[MAGNITUDES] = x.m.reshape(-1, *[1] * (x.a.ndim - 1))
        each = {end: values[ours] for end, ours in FORMS[dialect].items() if ours in values}
        found |= {f"{name}.{end}": y for end, y in each.items()}
    metadata = dict[str, str]()
    if dialect == "diffusers":
        always = ("peft_type", "r", "lora_alpha", "target_modules")
        kept = {k: x for k, x in fields.items() if k in always or x != DEFAULTS.get(k)}
        kept.pop("peft_version", None)  # which older versions refuse
        own_fields = {spell(dialect, prefix, k): x for k, x in kept.items()}
        metadata[FIELDS] = json.dumps(own_fields, indent=2, sort_keys=True)
    return metadata, found


def _narrow(alpha: float) -> np.ndarray:
    """Makes a scalar of float32 if it is exact, else of float64."""
    narrow = np.asarray(alpha, np.float32)
    return narrow if float(narrow) == alpha else np.asarray(alpha, np.float64)


def _find_mangled(names: Iterable[str], dialect: str, prefix: str | None) -> dict[str, str]:
    """Finds kohya's names, with their prefixes; raises if the dialect or `prefix` excludes them."""
    mangled = {x: found["prefix"] for x in names if (found := MANGLED.fullmatch(x))}
    why = "in which dots and _ are the same, so that only dialect 'kohya' can hold them."
    remedy = "Load the file onto its model with jlora.peft.load, and save that."
    wrong = [Problem(x, "is kohya's") for x in mangled if dialect != "kohya"]
    stop(wrong, "contents", f"has kohya's names, {why}", remedy)
    if other := next((p for p in mangled.values() if prefix not in (None, p)), None):
        why = f"must be {other!r}, as kohya's names have it, or None; got {prefix!r}."
        raise InputError("prefix", why)
    return mangled
