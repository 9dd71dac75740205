"""MiSS: rows of one small matrix, again and again, which is LoRA with an A that is known."""

from collections.abc import Mapping

import numpy as np

from ._other import UNKNOWN, Back, Fields, Form, Other, Shapes, Written, no_matrices


def _miss(fields: Fields, shapes: Shapes, inputs: int | None) -> Form | str:
    if (start := fields.get("init_weights", True)) not in (True, False):
        return f"init_weights {start!r} is another method, whose change is no s·A·B"
    if why := no_matrices(shapes, "miss_block"):
        return why
    r, outputs = shapes["miss_block"]
    if inputs is None:
        return UNKNOWN
    if r != fields["r"] or r > min(inputs, outputs):
        return (
            f"miss_block {shapes['miss_block']} does not fit {inputs} inputs at the rank "
            f"{fields['r']}"
        )

    return Form((r, inputs), (outputs, r), lambda x: (_identity(r, inputs), x["miss_block"].T))


def _identity(r: int, inputs: int) -> np.ndarray:
    return np.eye(r, dtype=np.float32)[:, np.arange(inputs) % r]


def _written(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Written:
    wrong = [
        f"{module}: its A does not repeat the identity, as that of initializers.miss does"
        for module, (a, _) in pairs.items()
        if not np.array_equal(a, _identity(*a.shape))
    ]
    ranks = sorted({len(a) for a, _ in pairs.values()})
    if len(ranks) != 1:
        wrong.append(f"its sites have the ranks {ranks}, where MiSS has one for all")
    blocks = {f"{module}.miss_block": np.ascontiguousarray(b.T) for module, (_, b) in pairs.items()}
    return wrong or ({"r": ranks[0]}, blocks)


_DEFAULTS: Fields = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "exclude_modules": None,
    "inference_mode": True,
    "init_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "mini_r": 1,
    "miss_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "MISS",
    "peft_version": "0.21.2",
    "r": 64,
    "revision": None,
    "target_modules": [],
    "task_type": None,
}
MISS = Other(
    fields=frozenset(("init_weights", "mini_r", "miss_dropout")),
    ranks=("r",),
    tensors=("miss_block",),
    shared=(),
    form=_miss,
    scales=lambda fields: {"r": 1, "lora_alpha": 1},
    bias="MiSS_only",
    dropout="miss_dropout",
    frozen=("a",),
    back=Back(_DEFAULTS, _written),
)
