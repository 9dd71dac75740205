"""Conversations as rows of tokens: read, tokenized by the chat template, packed, and their loss.

    texts = read([path], load_tokenizer(folder), 256)
    rows = lay(pack(texts, 256))                  # several in a row, which do not see each other
    rows = lay([[text] for text in texts])        # one in a row
    total, count = answer_nll(Partial(model.apply, variables), rows)

The chat template, which comes with a model, runs in the sandbox of `transformers`.
"""

import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import transformers
from jax.tree_util import Partial
from quickstart import take
from transformers import PreTrainedTokenizerFast

DEFINITIONS = pathlib.Path(__file__).parent / "definitions.jsonl"
TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")  # that templates may name
FORMS = """{"messages": [{"role": "user", "content": "…"}, …]}, {"prompt": "…", "completion": \
"…"} or {"conversations": [{"from": "human", "value": "…"}, …]}"""
ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT
OPEN = 64  # rows that another text may still go into

Messages = list[dict[str, str]]


class Text(NamedTuple):
    """A conversation up to its last answer."""

    messages: Messages
    ids: np.ndarray  # (tokens,)
    counts: np.ndarray  # (tokens,): 1 where the token belongs to an answer


class Rows(NamedTuple):
    """Conversations in rows."""

    ids: np.ndarray  # (rows, length) int32
    segments: np.ndarray  # (rows, length) int32: the conversation's number in its row, 0 is padding
    positions: np.ndarray  # (rows, length) int32: within the conversation
    counts: np.ndarray  # (rows, length) float32


def load_tokenizer(folder: pathlib.Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, whichever version of `transformers` wrote it.

    All of it but the chat template and the names of its tokens is in `tokenizer.json`. The class
    that `tokenizer_config.json` names is asked for only where the vocabulary is in other files:
    other versions may not have it.

    Raises:
        OSError: a file is missing.
        ValueError: there is no chat template or no `eos_token`.
    """
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
    if not (template and config.get("eos_token")):
        raise ValueError(f"{folder} lacks a chat template or an eos_token")
    if not (folder / "tokenizer.json").exists():
        kind = getattr(transformers, config.get("tokenizer_class", ""), transformers.AutoTokenizer)
        return kind.from_pretrained(folder)
    given = {name: config[name] for name in TOKENS if config.get(name)}
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        chat_template=template,
        clean_up_tokenization_spaces=config.get("clean_up_tokenization_spaces", False),
        model_input_names=["input_ids", "attention_mask"],
        **{name: x["content"] if isinstance(x, dict) else x for name, x in given.items()},
    )


def read_jsonl(path: pathlib.Path) -> list[Messages]:
    """The conversations of a JSON-lines file."""
    with path.open(encoding="utf-8-sig") as lines:  # `str.splitlines` cuts at U+2028 too
        return [_messages(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _messages(line: str, place: str) -> Messages:
    try:
        messages = to_messages(json.loads(line))
        wrong = not all(isinstance(x["role"] + x["content"], str) for x in messages)
    except (ValueError, KeyError, TypeError):
        wrong = True
    if wrong:
        raise ValueError(f"{place}: expected {FORMS}, got {line.strip()[:80]}")
    if all(x["role"] != "assistant" for x in messages[1:]):
        raise ValueError(f'{place}: no message after the first is "assistant"\'s')
    return messages


def to_messages(row: Mapping[str, Any]) -> Messages:
    """The messages of a row in any of the forms.

    Raises:
        KeyError: it is in none of them.
    """
    if "conversations" in row:  # of ShareGPT
        return [
            {"role": ROLES.get(x["from"], x["from"]), "content": x["value"]}
            for x in row["conversations"]
        ]
    if "prompt" in row:
        both = (("user", row["prompt"]), ("assistant", row["completion"]))
        each = ([{"role": r, "content": x}] if isinstance(x, str) else x for r, x in both)
        return [*itertools.chain(*each)]
    return row["messages"]


def encode(messages: Messages, tokenizer: Any) -> Text:
    """The conversation as the chat template has it; an answer ends where its turn does."""
    last = max(i for i, x in enumerate(messages) if x["role"] == "assistant")
    messages = messages[: last + 1]
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    whole = render(messages)
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.array([start for start, _ in found["offset_mapping"]])
    counts = np.zeros(len(starts), np.float32)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = (
                render(messages[:i], add_generation_prompt=True),
                render(messages[: i + 1]),
            )
            if not after.startswith(before) or not whole.startswith(after):
                raise ValueError(
                    f"the chat template writes message {i} otherwise where others follow: give "
                    f"conversations that end with it, not {json.dumps(messages)[:80]}"
                )
            counts[(starts >= len(before)) & (starts < len(after.rstrip()))] = 1
    end = len(counts) - counts[::-1].argmax()
    return Text(messages, np.array(found["input_ids"][:end], np.int32), counts[:end])


def read(
    paths: Sequence[pathlib.Path], tokenizer: Any, length: int, more_than: int = 0
) -> list[Text]:
    """The conversations of JSON-lines files that have at most `length` tokens.

    Raises:
        ValueError: a line is none, or there are too few.
    """
    texts = [encode(messages, tokenizer) for path in paths for messages in read_jsonl(path)]
    found = [text for text in texts if len(text.ids) <= length]
    if len(found) <= more_than:
        longest = max((len(text.ids) for text in texts), default=0)
        raise ValueError(
            f"{', '.join(map(str, paths))}: {len(found)} of {len(texts)} conversations have at "
            f"most {length} tokens; expected more than {more_than}. The longest has {longest}: "
            "allow for more tokens, or give more conversations"
        )
    return found


def pack(texts: Sequence[Text], length: int) -> list[list[Text]]:
    """Sorts texts into rows of at most `length` tokens, each into the first that has room."""
    rows: list[list[Text]] = []
    for text in texts:
        most = length - len(text.ids)
        fits = (row for row in rows[-OPEN:] if sum(len(x.ids) for x in row) <= most)
        if (row := next(fits, None)) is None:
            rows.append(row := [])
        row.append(text)
    return rows


def lay(rows: Sequence[Sequence[Text]], multiple: int = 1) -> Rows:
    """Rows of texts as arrays; empty rows follow up to a `multiple`."""
    shape = -(-len(rows) // multiple) * multiple, max(sum(len(t.ids) for t in row) for row in rows)
    laid = Rows(*np.zeros((3, *shape), np.int32), np.zeros(shape, np.float32))
    for i, row in enumerate(rows):
        end = 0
        for number, (_, ids, counts) in enumerate(row, 1):
            at, end = slice(end, end + len(ids)), end + len(ids)
            laid.ids[i, at], laid.segments[i, at], laid.counts[i, at] = ids, number, counts
            laid.positions[i, at] = np.arange(len(ids))
    return laid


def answer_nll(model_fn: Callable[..., jax.Array], rows: Rows) -> tuple[jax.Array, jax.Array]:
    """The negative log-likelihood of the answers in nats, and their number of tokens."""
    given = (x[:, :-1] for x in (rows.ids, rows.segments, rows.positions))
    log_probs = model_fn(*given, labels=rows.ids[:, 1:])
    counts = rows.counts[:, 1:]  # (rows, length - 1)
    return -(log_probs * counts).sum(), counts.sum()


def mean_nll(model_fn: Partial, rows: Rows, batch: int) -> float:
    """The mean negative log-likelihood per answer token, over `batch` rows at a time."""
    nll, starts = jax.jit(answer_nll), range(0, len(rows.ids), batch)
    total, count = np.sum([nll(model_fn, take(rows, slice(s, s + batch))) for s in starts], axis=0)
    return float(total / count)
