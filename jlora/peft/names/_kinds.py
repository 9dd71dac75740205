"""The kinds of weights that PEFT trains, a record each: what a file has of them, and ΔW."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of weight.

    Attributes:
        name: its name.
        axes: the axes of the weight in PyTorch, as in `Name`; a convolution has more of the last.
        letter: the one of these axes that only this kind has; earlier kinds count first.
        keys: the ends of the keys of A and B, or of new rows.
        transposed: whether ΔW is the transpose of B·A; None if the module tells.
        refused: the dialects and profiles that have no form for it.
    """

    name: str
    axes: str
    letter: str
    keys: tuple[str, ...] = (".lora_A.weight", ".lora_B.weight")
    transposed: bool | None = None
    refused: tuple[str, ...] = ()


_IMAGE = ("diffusers", "kohya")
EXPERTS = Kind("experts", "eoi", "e", refused=_IMAGE)
EMBEDDING = Kind(
    "embedding", "vo", "v", (".lora_embedding_A", ".lora_embedding_B"), True, refused=_IMAGE
)
CONV = Kind("conv", "oik", "k", transposed=False, refused=("vllm",))
LINEAR = Kind("linear", "oi", "i")
KINDS = (EXPERTS, EMBEDDING, CONV, LINEAR)
# New values of some rows.
ROWS = Kind("rows of an embedding", "vo", "", (".token_adapter.trainable_tokens_delta",))


def find_kind(axes: str) -> Kind | None:
    """Finds the kind of a weight by the axes of its row; None for a parameter that is no matrix."""
    is_matrix = "i" in axes or "v" in axes
    return next((kind for kind in KINDS if is_matrix and kind.letter in axes), None)
