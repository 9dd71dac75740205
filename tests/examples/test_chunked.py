"""Log-probabilities by chunks are those of whole logits, in values and in gradients."""

import functools

import chunked
import jax
import jax.numpy as jnp
import optax
import pytest
from cases._case import fill
from laws import assert_close
from models import llama
from small import every, normal, randomize

import jlora

ROWS, LENGTH, DIM, VOCAB = 2, 21, 32, 96
IDS = jax.random.randint(jax.random.key(0), (ROWS, LENGTH + 1), 0, VOCAB)
WEIGHTS = normal(1, ROWS, LENGTH)  # whatever a loss does with each token
LORA, NEW = jlora.LoRA("w", rank=2), (3, 17)
HEADS = {  # the head is "table", as is the embedding, or "head"
    "frozen": ("head", (LORA,)),
    "adapted": ("head", (LORA, jlora.LoRA("head", rank=2))),
    "DoRA": ("head", (LORA, jlora.DoRA("head", rank=2))),
    "Full": ("head", (LORA, jlora.Full("head"))),
    "NF4": ("head", (LORA, jlora.LoRA("head", rank=2))),
    "tied": ("table", (LORA, jlora.LoRA("table", rank=2))),
    "tied DoRA": ("table", (LORA, jlora.DoRA("table", rank=2))),
    "tied Full": ("table", (LORA, jlora.Full("table"))),
    "tied Rows": ("table", (LORA, jlora.Rows("table", NEW))),
    "tied NF4": ("table", (LORA, jlora.LoRA("table", rank=2))),
}
# Chunks that divide the tokens, that do not, that are one token, and one chunk.
LENGTHS = (7, 8, 1, 512)


def whole(head, hidden, labels):
    """The same of all logits at once."""
    logits = head(hidden)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return -optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def model(name, log_probs, p, ids):
    """Of each token after the first."""
    h = jnp.tanh(p["table"][ids[:, :-1]] @ p["w"])
    head = p["table"].T if name == "table" else p["head"]
    return log_probs(lambda h: h @ head, h, ids[:, 1:])


def by_chunks(length):
    return lambda *args: chunked.log_probs(*args, length)


def make(kind):
    """The transform of a form, a base, and an adapter whose B is not zero."""
    name, rules = HEADS[kind]
    shapes = {"table": (VOCAB, DIM), "w": (DIM, DIM), "head": (DIM, VOCAB)}
    params = {k: normal(i, *s) / 4 for i, (k, s) in enumerate(shapes.items())}
    if "NF4" in kind:
        params = jlora.quantize(params, jlora.NF4(f"w|{name}", block=32))

    def transform(log_probs):
        return jlora.transform(lambda p, ids: model(name, log_probs, p, ids), *rules)

    base, adapter = transform(whole).init(jax.random.key(0), params, IDS)
    return transform, base, randomize(adapter)


DAILY = [("NF4", 8), ("tied Rows", 8)]


@pytest.mark.parametrize(("kind", "length"), every(HEADS, LENGTHS, daily=DAILY))
def test_chunks_are_the_whole(kind, length):
    """Of a sum with a weight for each token, as of DPO and GRPO."""
    transform, base, adapter = make(kind)

    def both(adapter, base, form):
        lora = transform(form)
        weighted = lambda a: (WEIGHTS * lora.apply(base, a, IDS)).sum()  # noqa: E731
        return lora.apply(base, adapter, IDS), jax.grad(weighted)(adapter)

    program = jax.jit(lambda *args: [both(*args, form) for form in (whole, by_chunks(length))])
    expected, found = program(adapter, base)
    assert_close(found, expected, 1e-6, "chunks are the whole")


def test_no_row_has_all_logits():
    """And a frozen head is multiplied with twice, as it is where logits are whole."""
    transform, base, adapter = make("frozen")
    loss = lambda form: lambda a: transform(form).apply(base, a, IDS).mean()  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(loss(by_chunks(7))))(adapter))
    assert f"{LENGTH},{VOCAB}]" not in text and f"7,{VOCAB}]" in text
    products = [line for line in text.splitlines() if "dot_general" in line and "7," in line]
    assert sum(f"7,{VOCAB}]" in line or f"7,{DIM}]" in line for line in products) == 2


def test_what_is_only_evaluated_has_one_product():
    """The gradient by the hidden states, which nobody reads, is not computed."""
    transform, base, adapter = make("frozen")
    apply = transform(by_chunks(LENGTH)).apply
    program = jax.jit(apply).lower(base, adapter, IDS).compile()
    products = 2 * ROWS * LENGTH * DIM * (DIM + VOCAB)
    assert program.cost_analysis()["flops"] < 1.5 * products


@pytest.mark.parametrize(("tied", "last"), every([True, False], [7, 3], daily=[(True, 3)]))
def test_the_model_of_the_examples(tied, last):
    """Labels of the last tokens give their log-probabilities, with a cache and without."""
    config = llama.Config(VOCAB, 1, 16, 32, 2, 1, tied=tied)
    lm, ids = llama.Llama(config), IDS[:, :8]
    variables = fill(llama.shapes(config), jnp.float32, 0.3)
    labels = ids[:, -last:]

    @jax.jit
    def each(variables, cache):
        apply = functools.partial(lm.apply, variables, ids[:, :-1])
        logits = apply()[:, -last:]
        expected = -optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return expected, apply(labels=labels), apply(cache=cache, labels=labels)[0]

    expected, found, cached = each(variables, config.cache(ROWS, 6))  # too few slots by one
    assert_close(found, expected, 1e-6, "labels")
    assert_close(cached[:, :-1], expected[:, :-1], 1e-6, "labels")
    assert jnp.isnan(cached[:, -1]).all()
