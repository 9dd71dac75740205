"""Checks whether an engine serves an adapter as PEFT would, by the headers of adapter and base."""

import os
import shlex
from collections.abc import Collection
from typing import NamedTuple

from ..._errors import InputError
from .._checkpoint import open_checkpoint
from .._file import DTYPES, PREFIX
from .._recognized import find_image
from ..adapter._config import list_misformed
from ..adapter._files import Files
from ..adapter._open import open_adapter
from ..adapter._patterns import list_bad_patterns
from ..adapter._sorted import FACTOR
from . import ENGINES
from ._engine import Base, Engine, Finding, Served, Side
from ._vllm import AGAIN


class Checked(NamedTuple):
    """The result of `check`; `print` shows it.

    Attributes:
        path: the adapter's folder.
        engine: the engine and its version.
        findings: what the engine refuses or drops; empty if it serves the adapter as PEFT would.
        start: a command that starts the engine with the adapter.
        compared: whether names and shapes were compared with a base.
        notes: what else to know, such as what older versions of the engine drop.
    """

    path: str
    engine: str
    findings: list[Finding]
    start: str
    compared: bool
    notes: list[str]

    def __str__(self) -> str:
        unknown = "" if self.compared else "; without a base, names and shapes are not compared"
        supported = f"{self.path}: {self.engine} supports it: {self.start}{unknown}"
        lines = [f"{self.engine}: {x}" for x in self.findings] or [supported]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def check(
    path: str | os.PathLike[str],
    engine: str,
    *,
    base: str | os.PathLike[str] | None = None,
    max_lora_rank: int | None = None,
    ignore: Collection[str] = (),
) -> Checked:
    r"""Finds out which parts of an adapter an engine refuses, and which it drops silently.

    Only configurations and headers are read, no weights. The rules for vLLM, also on TPUs, are
    those that runs confirm; the page "What vLLM served" has the tables. Which modules of a model
    take adapters, and by which names, is what vLLM's own class of the model declares.

    Args:
        path: the adapter's folder, as PEFT or `save` wrote it.
        engine: `"vllm"`, or `"tpu-inference"`, which is vLLM on TPUs.
        base: the folder of the served model, a Hugging Face checkpoint. Without it, names and
            shapes are not compared.
        max_lora_rank: the server's option; None for its default.
        ignore: as in `load`. The engine is checked as if the file did not have these fields.

    Returns:
        A record; `print` shows it. Its `findings` are empty if the engine serves the adapter as
        PEFT would. Each says `what`, `why`, a `remedy`, and whether the engine is `silent` about
        it. `start` is a command that starts the engine, and `notes` say what else to know.

    Raises:
        FileNotFoundError: if a folder or a file is missing.
        ValueError: if there is no such `engine`, the engine does not allow `max_lora_rank`, or the
            files are damaged.

    Source: vLLM 0.32.0 and tpu-inference 0.32.0, run on a CPU.

    Examples:
        >>> import tempfile, jax, jax.numpy as jnp, jlora
        >>> from jlora import peft
        >>> params = {"model": {"q_proj": {"kernel": jnp.ones((64, 64))}}}
        >>> names = [peft.Name(r"(.*)/kernel", r"\1", "io")]
        >>> f = lambda p, x: x @ p["model"]["q_proj"]["kernel"]
        >>> lora = jlora.transform(f, jlora.LoRA("q_proj", rank=20))
        >>> base, adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 64)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     peft.save(f"{folder}/adapter", base, adapter, names)
        ...     checked = peft.check(f"{folder}/adapter", "vllm")
        >>> [finding] = checked.findings
        >>> print(finding.why, finding.remedy, sep="\n")
        20 is above --max-lora-rank 16
        Start the server with --max-lora-rank 32, and check again with the same option
    """
    if engine not in ENGINES:
        raise InputError("engine", f"must be one of {', '.join(ENGINES)}; got {engine!r}.")
    server = ENGINES[engine]
    rank = _rank(server, max_lora_rank)
    if image := find_image(path):
        why = f"serves no image LoRA; {image} is no adapter of PEFT in a folder"
        raise InputError("path", f"{server.title} {why}.", path=image)
    files = open_adapter(path, "path", ignore)
    if wrong := list_misformed(files.fields) or list_bad_patterns(files.fields):
        findings = [Finding(x.where, x.why, AGAIN, False) for x in wrong]
        notes = []
    else:
        served = _served(files, None if base is None else _base(base), rank)
        findings = [found for rule in server.rules for found in rule(served)]
        notes = list(server.notes(served))
    folder, model = (shlex.quote(os.fspath(x)) for x in (path, base or "BASE"))
    start = server.start.format(dir=folder, base=model, rank=rank)
    title = f"{server.title} {server.version}"
    return Checked(os.fspath(path), title, findings, start, base is not None, notes)


def _rank(engine: Engine, given: int | None) -> int:
    """Returns the largest rank that the server supports."""
    if given is not None and given not in engine.ranks:
        why = f"must be one of {engine.ranks} for {engine.title}; got {given!r}."
        raise InputError("max_lora_rank", why)
    return engine.rank if given is None else given


def _served(files: Files, base: Base | None, max_lora_rank: int) -> Served:
    factors, others = list[Side](), list[str]()
    for x in files.tensors:
        if found := FACTOR.fullmatch(x.key.removeprefix(PREFIX)):
            module, depth, side, table = found.group("module", "depth", "side", "table")
            one = (module, depth.count("."), side or table, bool(table), x.shape)
            factors.append(Side(x.key, *one))
        else:
            others.append(x.key)
    return Served(files.fields, factors, others, base, max_lora_rank)


def _base(path: str | os.PathLike[str]) -> Base:
    checkpoint = open_checkpoint(path, "base", follow_links=True)
    entries = {name: checkpoint.entry(name) for name in checkpoint.where}
    # Packed codes do not have the shape of the weight.
    shapes = {name: x.shape if x.dtype in DTYPES else () for name, x in entries.items()}
    return Base(checkpoint.config, shapes)
