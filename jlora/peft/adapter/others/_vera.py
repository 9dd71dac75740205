"""VeRA: an A and a B that all modules share, with a number for each row of both."""

import numpy as np

from ._other import UNKNOWN, Arrays, Fields, Form, Other, Shapes


def _vera(fields: Fields, shapes: Shapes, inputs: int | None) -> Form | str:
    lengths = [shapes.get(name, ()) for name in ("vera_lambda_d", "vera_lambda_b")]
    a, b, r = shapes["vera_A"], shapes["vera_B"], fields["r"]
    if any(len(x) != 1 for x in lengths):
        return f"vera_lambda_d and vera_lambda_b must be vectors; got shapes {lengths}"
    (d,), (outputs,) = lengths
    if inputs is None:
        return UNKNOWN
    if d != r or a[:1] != (r,) or b[1:] != (r,) or inputs > a[1] or outputs > b[0]:
        return f"vera_A {a} and vera_B {b} do not fit {inputs} inputs, {outputs} outputs, rank {r}"
    if r > min(inputs, outputs):
        return f"its rank {r} is above that of {inputs} inputs and {outputs} outputs"

    def make(x: Arrays) -> tuple[np.ndarray, np.ndarray]:
        d, b = x["vera_lambda_d"][:, None], x["vera_lambda_b"][:, None]
        return d * x["vera_A"][:, :inputs], b * x["vera_B"][:outputs]

    return Form((r, inputs), (outputs, r), make)


VERA = Other(
    fields=frozenset(
        ("d_initial", "init_weights", "projection_prng_key", "save_projection", "vera_dropout")
    ),
    ranks=("r",),
    tensors=("vera_lambda_b", "vera_lambda_d"),
    shared=("vera_A", "vera_B"),
    form=_vera,
    scales=lambda fields: {"r": 1, "lora_alpha": 1},
    bias="vera_only",
    dropout="vera_dropout",
)
