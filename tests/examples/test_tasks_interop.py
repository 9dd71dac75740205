"""The beam search of the examples against that of `transformers` on PyTorch, over one GPT-2.

Needs the extra `interop`.
"""

import jax
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from models import beam, gpt  # noqa: E402

# What PyTorch and its libraries warn of is theirs.
pytestmark = pytest.mark.filterwarnings("default")

CONFIG = {"vocab_size": 61, "n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 4}
PAD = 4
PROMPTS = [(5, 6, 7, 5, 6), (8, 9, 10, 11, 12), (60, 1, 60, 1, 2)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One random GPT-2, theirs and ours with a cache and without."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**CONFIG, initializer_range=0.4, bos_token_id=0, eos_token_id=3)
    )
    with torch.no_grad():
        theirs.transformer.wpe.weight *= 10  # else it repeats its input
    theirs.save_pretrained(folder)
    config, variables = gpt.load(folder)
    ours = jax.tree_util.Partial(gpt.GPT(config).apply, variables)
    return theirs.eval(), (beam.cached(ours, config.cache), beam.uncached(ours))


FEW, MORE = (23,), (40, 23, 48)
ROWS = [
    (5, 0.9, 2, MORE),
    (2, 0.0, 0, FEW),
    (5, -1.0, 0, MORE),
    (2, -1.0, 2, FEW),
    (5, 0.0, 2, FEW),
]


@pytest.mark.parametrize(("beams", "penalty", "no_repeat", "stop"), ROWS)
def test_texts_and_scores(models, beams, penalty, no_repeat, stop):
    theirs, steps = models
    expected = theirs.generate(
        torch.tensor(PROMPTS),
        attention_mask=torch.ones(len(PROMPTS), 5, dtype=torch.int64),
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=8,
        length_penalty=penalty,
        no_repeat_ngram_size=no_repeat,
        eos_token_id=list(stop),
        pad_token_id=PAD,
        early_stopping="never",
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    scores = expected.sequences_scores.tolist()
    rules = {"beams": beams, "stop": stop, "penalty": penalty, "no_repeat": no_repeat}
    for step in steps:
        found = beam.search(step, PROMPTS, new_tokens=8, **rules)
        texts = [text for several in found for text in several]
        assert len(texts) == len(PROMPTS) * beams
        assert [text.score for text in texts] == pytest.approx(scores, abs=1e-4)
        for text, ids in zip(texts, expected.sequences[:, 5:].tolist(), strict=True):
            assert tuple(ids[: len(text.ids)]) == text.ids
            assert set(ids[len(text.ids) :]) <= {PAD}
        assert any(text.ids[-1] in stop for text in texts)
