"""AdaLoRA: A and B with a number for each of the rank, of which some were taken away."""

from ._other import Fields, Form, Other, Shapes, no_matrices


def _adalora(fields: Fields, shapes: Shapes, inputs: int | None) -> Form | str:
    if why := no_matrices(shapes, "lora_A", "lora_B", "lora_E"):
        return why
    (r, inputs), (outputs, other), e = (shapes[f"lora_{name}"] for name in "ABE")
    if e != (r, 1) or other != r or r > fields["init_r"]:
        listed = ", ".join(f"lora_{name} {shapes[f'lora_{name}']}" for name in "ABE")
        return f"{listed} do not fit at the rank {fields['init_r']}"
    return Form((r, inputs), (outputs, r), lambda x: (x["lora_A"] * x["lora_E"], x["lora_B"]))


def _scaled(fields: Fields) -> Fields:
    """AdaLoRA's: alpha over the rank before any was taken away, or 1 without an alpha."""
    rank, alpha = fields["init_r"], fields.get("lora_alpha", 8)
    return {"r": 1, "lora_alpha": (alpha if alpha > 0 else rank) / (rank + 1e-5)}


ADALORA = Other(
    fields=frozenset(
        (
            "beta1",
            "beta2",
            "deltaT",
            "init_r",
            "orth_reg_weight",
            "target_r",
            "tfinal",
            "tinit",
            "total_step",
        )
    ),
    ranks=("init_r",),
    tensors=("lora_A", "lora_B", "lora_E"),
    shared=(),
    form=_adalora,
    scales=_scaled,
)
