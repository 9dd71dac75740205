"""Texts to tokens: rows of variable length, which `batches.py` pads."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

Row = Mapping[str, np.ndarray]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face checkpoint.

    Raises:
        FileNotFoundError: the folder has no tokenizer.json.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"`{path}` is missing. Put the checkpoint's there; where it has vocab files only, "
            "`transformers` writes it by AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    return Tokenizer.from_file(str(path))


def classification(
    texts: Sequence[tuple[str, ...]],
    labels: Sequence[int | float],
    tokenizer: Tokenizer,
    length: int,
) -> list[Row]:
    """Texts, or pairs of texts, with the tokenizer's special tokens, cut to `length` tokens.

    Of a pair, tokens are cut from the longer one first.

    Args:
        texts: one or two each.
        labels: of the same number.
        tokenizer: of the model; it is not changed.
        length: the most tokens.

    Returns:
        Rows of ``ids`` and ``types``, (tokens,) int32, and ``label``, () int32, or float32 if any
        label is a float.
    """
    tokenizer = plain(tokenizer)
    tokenizer.enable_truncation(length, strategy="longest_first")
    encoded = tokenizer.encode_batch([pair if len(pair) > 1 else pair[0] for pair in texts])
    dtype = np.float32 if any(isinstance(label, float) for label in labels) else np.int32
    return [
        {
            "ids": np.array(e.ids, np.int32),
            "types": np.array(e.type_ids, np.int32),
            "label": np.array(label, dtype),
        }
        for e, label in zip(encoded, labels, strict=True)
    ]


def generation(
    pairs: Iterable[tuple[str, str]], tokenizer: Tokenizer, length: int, stop: int, start: int
) -> list[Row]:
    """Prompts and answers for training: prompt, `start`, answer, `stop`.

    What is too long loses the beginning of its prompt.

    Args:
        pairs: of texts. Put a space before answers where the tokenizer tells words by it.
        tokenizer: of the model; special tokens are not added.
        length: the most tokens.
        stop: the token that ends an answer.
        start: the token between prompt and answer.

    Returns:
        Rows of ``ids``, (tokens,) int32, and ``counts``, (tokens,) float32: 1 where the token
        belongs to the answer, `stop` included.

    Raises:
        ValueError: an answer alone does not fit.
    """
    pairs, tokenizer = list(pairs), plain(tokenizer)
    first, second = zip(*pairs, strict=True) if pairs else ((), ())
    prompts, answers = (
        [e.ids for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        for texts in (first, second)
    )
    rows = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = [*answer, stop]
        if len(end) + 1 > length:
            raise ValueError(
                f"`length` = {length}: answer {number} has {len(answer)} tokens and needs "
                f"{len(end) + 1}: {pairs[number][1][:80]!r}"
            )
        begin = [*prompt, start][-(length - len(end)) :]
        counts = np.array([0] * len(begin) + [1] * len(end), np.float32)
        rows.append({"ids": np.array(begin + end, np.int32), "counts": counts})
    return rows


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that neither cuts nor pads, as files of tokenizers may ask for."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
