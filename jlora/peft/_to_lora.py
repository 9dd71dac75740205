"""Other methods of PEFT's whose ΔW is s·A·B for some A and B, as LoRA."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ._checkpoint import open_checkpoint
from ._file import DTYPES, PREFIX, Source, listing, shown
from .adapter._alone import alone_in
from .adapter._config import DEFAULTS
from .adapter._others import SELECTION, Fields, in_terms_of_lora, named, problems_of
from .adapter._parts import AB
from .adapter._read import Stored
from .adapter._saved import Saved, in_memory, saved_in, write
from .adapter._select import Selection, with_scales
from .adapter.others import Form, Other

ROOT = PREFIX.removesuffix("model.")
LARGEST = 2**32  # bytes of all A and B


def to_lora(
    path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None = None,
) -> None:
    r"""Writes an adapter of AdaLoRA, VeRA, LoKr or MiSS as one of LoRA with the same ΔW.

    In PEFT's layout, where ΔW is (outputs, inputs):

    - AdaLoRA: $B\,\mathrm{diag}(e)\,A \cdot \alpha / (r_0 + 10^{-5})$, $r_0$ the rank before any
      was taken away; what has none left is left out.
    - VeRA: $\mathrm{diag}(b)\,B\,\mathrm{diag}(d)\,A$ with an A and a B that all modules share, cut
      to their sizes. They have to be in the file (`save_projection`).
    - LoKr: $s \cdot W_1 \otimes W_2$, which is $(X \otimes P)(Y \otimes Q)$ for $W_1 = X Y$ and
      $W_2 = P Q$. The rank is at least that of W_2 times the smaller side of W_1; where it is not
      below that of ΔW, as where W_2 is no product, the module is refused.
    - MiSS: $D^\top A$ with an A that repeats the identity. Its other forms, "bat" and "mini", are
      refused. It comes out as LoRA whose A may be trained; `load` freezes it.

    Args:
        path: the adapter's folder.
        out_dir: a folder that does not exist yet, or an empty one. It appears complete or not at
            all.
        checkpoint: the folder of the base model, of which VeRA and MiSS need the sizes of modules.

    Raises:
        FileExistsError: if `out_dir` is there and not an empty folder.
        FileNotFoundError: if a folder or a file is missing.
        ValueError: if the files are damaged or of another method, or have no such form; if A and B
            would take more than 4 GiB. All of it is listed.

    Source: Zhang et al., AdaLoRA, arXiv 2303.10512; Kopiczko et al., VeRA, arXiv 2310.11454; Yeh et
    al., LoKr, arXiv 2309.14859; Kang and Yin, MiSS, arXiv 2409.15371; PEFT 0.21.

    Examples:
        >>> from jlora import peft
        >>> peft.to_lora("adalora", "as_lora")  # doctest: +SKIP
        >>> adapter = peft.load("as_lora", base, peft.LLAMA)  # doctest: +SKIP
    """
    shapes = {} if checkpoint is None else open_checkpoint(checkpoint, "checkpoint").shapes
    made, _ = as_lora(saved_in(Source(Path(path))), shapes, _refuse)
    tensors = made.read(made.tensors)
    alone_in(in_memory(made.fields, tensors, "path"), _refuse)
    write(out_dir, "`out_dir`", made.fields, tensors)


def as_lora(
    saved: Saved, shapes: Mapping[str, tuple[int, ...]], refuse: Callable[[Sequence[str]], None]
) -> tuple[Saved, tuple[str, ...]]:
    """An adapter of another method as one of LoRA, and which of A and B are not trained.

    `shapes` are those of the base, if known; `refuse` is given what has no form in LoRA.
    """
    fields, entries = saved.fields, {x.key: x for x in saved.tensors}
    kind = named(fields)
    refuse(problems_of(fields, kind))
    forms, others, absent = _forms(fields, kind, entries, shapes, refuse)
    size = sum(4 * (math.prod(form.a) + math.prod(form.b)) for form in forms.values())
    if size > LARGEST and not saved.is_own:
        refuse([f"A and B would take {size / 2**30:.1f} GiB; at most {LARGEST >> 30} are written"])
    selection = Selection(DEFAULTS | kind.scales(fields), f"`{saved.argument}`")
    selection.prepare(forms)
    scales = {module: (form.a[0], selection.scale(module)) for module, form in forms.items()}
    own = in_terms_of_lora(fields, kind)
    if absent or own.get("target_modules") is None:
        own |= {**dict.fromkeys(SELECTION), "target_modules": list(forms)}
    tensors = [
        Stored(f"{PREFIX}{module}{end}", "F32", shape)
        for module, form in forms.items()
        for end, shape in zip(AB, (form.a, form.b), strict=True)
    ]
    tensors += [entries[key] for key in others]

    def read(wanted: Iterable[Stored]) -> dict[str, np.ndarray]:
        found = _tensors(saved.read(saved.tensors), kind, forms, others)
        return {x.key: found[x.key] for x in wanted}

    made = Saved(with_scales(DEFAULTS | own, scales), tensors, read, saved.argument, saved.is_own)
    return made, kind.frozen


def _refuse(wrong: Sequence[str]) -> None:
    if wrong:
        raise ValueError(f"`path`: the adapter has no form in LoRA. {listing(wrong)}")


# ------------------------------------------------------------------------------- what the file has


def _forms(
    fields: Fields,
    kind: Other,
    entries: Mapping[str, Stored],
    shapes: Mapping[str, tuple[int, ...]],
    refuse: Callable[[Sequence[str]], None],
) -> tuple[dict[str, Form], list[str], bool]:
    """The form of each module, the keys of what is no part of one, and whether some have none."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    shared, others, wrong = dict[str, tuple[int, ...]](), list[str](), list[str]()
    for key, entry in entries.items():
        module, _, end = key.removeprefix(PREFIX).rpartition(".")
        if entry.dtype not in DTYPES:
            wrong.append(f"{shown(key)}: expected a floating-point dtype, got {entry.dtype}")
        elif key.removeprefix(ROOT) in kind.shared:
            shared[key.removeprefix(ROOT)] = entry.shape
        elif end in kind.tensors and key.startswith(PREFIX):
            found.setdefault(module, {})[end] = entry.shape
        else:
            others.append(key)
    wrong += [
        f"{ROOT}{name}: missing; without it there are only the numbers that PyTorch's generator "
        "gives. Save the adapter with save_projection=True"
        for name in kind.shared
        if name not in shared
    ]
    refuse(wrong)
    forms, flag = {}, bool(fields.get("fan_in_fan_out"))
    for module, own in found.items():
        weight = shapes.get(f"{module}.weight", ())
        form = kind.form(fields, own | shared, weight[not flag] if len(weight) == 2 else None)
        if isinstance(form, str):
            wrong.append(f"{shown(module)}: {form}")
        elif form.a[0]:
            forms[module] = form
    refuse(wrong if forms else wrong or ["no module has a change"])
    return forms, others, len(forms) < len(found)


def _tensors(
    found: Mapping[str, np.ndarray], kind: Other, forms: Mapping[str, Form], others: Sequence[str]
) -> dict[str, np.ndarray]:
    """All tensors of the adapter of LoRA."""
    made = {key: found[key] for key in others}
    shared = {name: _wide(found[f"{ROOT}{name}"]) for name in kind.shared}
    for module, form in forms.items():
        start = f"{PREFIX}{module}"
        own = {n: _wide(found[key]) for n in kind.tensors if (key := f"{start}.{n}") in found}
        pair = form.make(own | shared)
        made |= {start + end: _wide(x) for end, x in zip(AB, pair, strict=True)}
    return made


def _wide(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32)
