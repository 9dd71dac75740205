"""PEFT's files of DoRA and of rows of embeddings that are damaged: each refused by name."""

import re
import time

import numpy as np
import pytest
from peft_files import (
    CONFIG,
    PREFIX,
    TENSORS,
    Damage,
    Files,
    Folder,
    all_of,
    change,
    drop,
    put,
    say,
)
from test_peft_merged import fixture

from jlora import peft

Q, K = (f"{PREFIX}model.layers.0.self_attn.{x}_proj" for x in "qk")
M = ".lora_magnitude_vector"
EMBED = PREFIX + "model.embed_tokens"
ROWS = ".token_adapter.trainable_tokens_delta"
INDICES = "trainable_token_indices"
ONES = np.ones(8, np.float32)
DORA: dict[str, tuple[Damage, str]] = {
    "missing": (drop(Q + M), f"  {Q}{M}: missing, though {Q}.lora_A.weight is there"),
    "extra": (
        put(K + M, ONES),
        f"{K}{M}: unexpected; there is no A and B of model.layers.0.self_attn.k_proj",
    ),
    "longer": (put(Q + M, np.ones(9, np.float32)), f"  {Q}{M}: expected shape (8,), got (9,)"),
    "empty": (put(Q + M, ONES[:0]), f"  {Q}{M}: expected shape (8,), got (0,)"),
    "zeros": (
        put(Q + M, 0 * ONES),
        f"  {Q}{M}: all of its 8 values are 0, with which the module gives nothing",
    ),
    "not finite": (put(Q + M, np.inf * ONES), f"  {Q}{M}: 8 of 8 values are not finite"),
    "integers": (
        put(Q + M, ONES.astype(np.int32)),
        f"  {Q}{M}: expected a floating-point dtype, got I32",
    ),
    "flag": (say(use_dora="yes"), "  use_dora: expected true or false, got 'yes'"),
    "off": (say(use_dora=False), f"  {Q}{M}: unexpected; adapter_config.json has no use_dora"),
    "beside biases": (
        say(lora_bias=True),
        "  lora_bias: True is nothing that PEFT has beside use_dora",
    ),
    "of parameters": (
        say(target_parameters=["experts.up"]),
        "  target_parameters: ['experts.up'] is nothing that PEFT has beside use_dora",
    ),
}
LISTED = "distinct rows, or rows by the names of at most 100 modules, or null"
TOKENS: dict[str, tuple[Damage, str]] = {
    "missing": (
        drop(EMBED + ROWS),
        f"  {INDICES}: selects rows, missing in adapter_model.safetensors",
    ),
    "not listed": (
        say(**{INDICES: None}),
        f"  {EMBED}{ROWS}: unexpected; {INDICES} lists none of its rows",
    ),
    "another is listed": (
        say(**{INDICES: {"wte": [1, 2, 3]}}),
        f"  {EMBED}{ROWS}: unexpected; {INDICES} lists none of its rows",
    ),
    "listed twice": (
        say(**{INDICES: {"embed_tokens": [1, 2, 3], "tokens": [1, 2, 4]}}),
        f"  {EMBED}{ROWS}: unexpected; {INDICES} lists other rows too",
    ),
    "another head": (
        say(**{INDICES: {"embed_tokens": [9, 2, 3], "q_proj": [9, 2, 3]}}),
        f"  {INDICES}: selects q_proj, missing in adapter_model.safetensors",
    ),
    "two": (
        put(PREFIX + "other" + ROWS, np.ones((3, 8), np.float32)),
        f"  {INDICES}: expected rows of one embedding; there are values for 2",
    ),
    "more rows": (
        put(EMBED + ROWS, np.ones((4, 8), np.float32)),
        f"  {EMBED}{ROWS}: expected shape (3, 8), got (4, 8)",
    ),
    "beyond": (
        say(**{INDICES: [1, 2, 11]}),
        f"  model.embed_tokens: {INDICES} lists row 11, of 11; grow the vocabulary first",
    ),
    "not finite": (
        put(EMBED + ROWS, np.full((3, 8), np.nan, np.float32)),
        f"  {EMBED}{ROWS}: 24 of 24 values are not finite",
    ),
    "integers": (
        put(EMBED + ROWS, np.ones((3, 8), np.int64)),
        f"  {EMBED}{ROWS}: expected a floating-point dtype, got I64",
    ),
    "of a linear module": (
        all_of(
            say(**{INDICES: {"embed_tokens": [9, 2, 3], "k_proj": [1]}}), put(K + ROWS, ONES[None])
        ),
        f"{K}{ROWS}: rows of what is no embedding by `names`",
    ),
    "of the head alone": (
        all_of(
            say(**{INDICES: {"embed_tokens": [9, 2, 3], "lm_head": [1]}}),
            put(PREFIX + "lm_head" + ROWS, ONES[None]),
        ),
        f"{PREFIX}lm_head{ROWS}: rows of a head whose weight is that of model.embed_tokens",
    ),
    "beside A and B": (
        all_of(
            put(EMBED + ".lora_embedding_A", np.ones((2, 11), np.float32)),
            put(EMBED + ".lora_embedding_B", np.ones((8, 2), np.float32)),
        ),
        f"  {EMBED}{ROWS}: rows of what is adapted as a whole too",
    ),
    "beside the whole": (
        say(modules_to_save=["embed_tokens"]),
        f"  {EMBED}{ROWS}: rows of what is adapted as a whole too",
    ),
    "another table": (
        put(EMBED + ".token_adapter.base_layer.weight", np.ones((11, 8), np.float32)),
        f"  {EMBED}.token_adapter.base_layer.weight: expected the values of `base` at ",
    ),
} | {
    f"rows {wrong!r}": (say(**{INDICES: wrong}), f"  {INDICES}: expected {LISTED}, got {wrong!r}")
    for wrong in ([1, 2, -1], [1, 2, 2], [], "123", [True, 2, 3])
}
ALONE: dict[str, tuple[Damage, str]] = {
    "no rows": (say(token_indices=[]), "  token_indices: expected distinct rows, got []"),
    "another": (
        say(target_modules=["wte"]),
        f"  {EMBED}.trainable_tokens_delta: unexpected; adapter_config.json does not select it",
    ),
    "A": (
        put(Q + ".lora_A.weight", np.ones((2, 8), np.float32)),
        f"  {Q}.lora_A.weight: unexpected; adapter_config.json does not select it",
    ),
    "fewer": (
        say(token_indices=[1]),
        f"  {EMBED}.trainable_tokens_delta: expected shape (1, 8), got (3, 8)",
    ),
    "missing": (
        change(lambda t: t.clear() or t.update({Q: ONES})),
        "model.embed_tokens.weight: selected by adapter_config.json, but missing in ",
    ),
    "feature": (say(r=8), "  r: 8 is a feature that jlora does not support"),
    "nothing": (
        say(target_modules=None),
        f"  {EMBED}.trainable_tokens_delta: unexpected; adapter_config.json does not select it",
    ),
}
DAMAGES = {
    (name, damage): found
    for name, each in {"dora": DORA, "tokens": TOKENS, "alone": ALONE}.items()
    for damage, found in each.items()
}
# What nothing but the tree of the model can tell.
OF_TREES = {"of a linear module", "of the head alone", "another table"}


def files(name: str, folder: Folder) -> Files:
    """A copy of a fixture; `alone` is one of rows and nothing else."""
    found = Files(folder, "tokens" if name == "alone" else name)
    if name != "alone":
        return found
    adapter = found.load()
    rows = {"params": {"embed": adapter["params"]["embed"]}}
    for file in (CONFIG, TENSORS):
        (found.folder / file).unlink()
    peft.save(found.folder, found.case.base, rows, found.case.names)
    return found


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_refused(name: str, damage: str, tmp_path: Folder) -> None:
    """Onto a tree and onto a checkpoint, with the same words; nothing is written."""
    change, message = DAMAGES[name, damage]
    found = files(name, tmp_path)
    found.load()
    change(found)
    with pytest.raises(ValueError, match=re.escape(message)):
        found.load()
    if damage not in OF_TREES:
        _, base = fixture("tokens" if name == "alone" else name, tmp_path)
        with pytest.raises(ValueError, match=re.escape(message)):
            peft.export_merged(base, found.folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_dora_of_a_tied_embedding_is_refused(tmp_path: Folder) -> None:
    """Onto a tree and onto a checkpoint."""
    found = Files(tmp_path, "dora_scanned")
    config = peft.read_config(found.folder)
    found.config(target_modules=[*config["target_modules"], "embed_tokens"])
    shapes = {".lora_embedding_A": (2, 11), ".lora_embedding_B": (8, 2), M: (8,)}
    new = {EMBED + end: np.ones(shape, np.float32) for end, shape in shapes.items()}
    found.tensors(lambda t: t.update(new))
    message = "model.embed_tokens: of DoRA, which is not supported beside lm_head, a tied weight"
    with pytest.raises(ValueError, match=message):
        found.load()
    _, base = fixture("dora_scanned", tmp_path)
    with pytest.raises(ValueError, match="embedding and the output head share this weight"):
        peft.export_merged(base, found.folder, tmp_path / "out")


@pytest.mark.parametrize("form", ["list", "by name", "alone"])
def test_many_rows_of_many_modules_take_no_time(form: str, tmp_path: Folder) -> None:
    """A list of a hundred thousand rows, and twenty thousand modules with values."""
    found = files("alone" if form == "alone" else "tokens", tmp_path)
    rows, end = list(range(99_999)), ROWS
    if form == "alone":
        found.config(token_indices=rows, target_modules=".*")
        end = ".trainable_tokens_delta"
    else:
        many = {f"m{i}": rows[:900] for i in range(99)}
        found.config(**{INDICES: rows if form == "list" else many})
    few = {f"{PREFIX}m{i}{end}": np.ones((1, 1), np.float32) for i in range(20_000)}
    found.tensors(lambda t: t.update(few))
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"expected (rows of|100 or fewer)"):
        peft.read(found.folder)
    assert time.monotonic() - start < 10
