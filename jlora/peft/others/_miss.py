"""MiSS: rows of one small matrix, again and again, which is LoRA with an A that is known."""

import numpy as np

from ._other import UNKNOWN, Fields, Form, Other, Shapes, no_matrices


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

    def identity() -> np.ndarray:
        return np.eye(r, dtype=np.float32)[:, np.arange(inputs) % r]

    return Form((r, inputs), (outputs, r), lambda x: (identity(), x["miss_block"].T))


MISS = Other(
    fields=frozenset(("init_weights", "mini_r", "miss_dropout")),
    ranks=("r",),
    tensors=("miss_block",),
    shared=(),
    form=_miss,
    scales=lambda fields: {"r": 1, "lora_alpha": 1},
)
