"""`python examples/paper train`: from small files of the official formats to scores.

The checkpoints are small, of the real architectures, with tokenizers of the real kinds.
"""

import itertools

import jax
import numpy as np
import pytest
import tables
from models import bert, gpt
from models.tiny import train_tokenizer
from paper import train as paper
from paper.tasks import pretrained, table, texts
from tokenizers import processors

from jlora import checkpoint
from tests.examples.test_models import Small
from tests.examples.test_tasks import tsv, write

FILLERS = ("film", "story", "plot", "actor", "the", "a")
WORDS = {  # of each class
    0: ("good", "great", "fine"),
    1: ("bad", "awful", "poor"),
    2: ("red", "blue", "green"),
}
E2E = """mr,ref
"name[The Eagle], eatType[coffee shop]",The Eagle is a cheap coffee shop.
"name[The Mill], near[Café Sicilia]",You find The Mill near Café Sicilia.
"""
ROBERTA = bert.Config(320, 32, 2, 4, 64, 66, 1, 1e-5, "roberta", 1, 0.0, 0.0, "lm")
GPT = gpt.Config(400, 192, 2, 32, 4, dropout=0.0)
LEARN = ("--epochs", 4, "--batch", 16, "--learning-rate", 2e-2, "--alpha", 16, "--scan")


def sentence(rng, *kinds):
    """Two fillers, and a word of each kind, in any order."""
    words = [*rng.choice(FILLERS, 2), *(rng.choice(WORDS[kind]) for kind in kinds)]
    return " ".join(rng.permutation(words))


def sst2(folder):
    """Class 1 is that of the good words."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 128), ("dev", 64)):
        labels = rng.permutation(np.arange(count) % 2)
        rows = [f"{sentence(rng, *[1 - label] * 2)}|{label}" for label in labels]
        write(folder, {f"SST-2/{split}.tsv": tsv("sentence|label", *rows)})
    return folder


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A folder as Hugging Face's, of random weights."""
    folder = tmp_path_factory.mktemp("roberta")
    Small(bert, bert.Bert, ROBERTA).write(folder)
    words = [*FILLERS, *itertools.chain(*WORDS.values())]
    tokenizer = train_tokenizer(["<s>", "<pad>", "</s>", "<unk>"], " ".join(words))
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def train(task, weights, folder, out, *more, model="roberta-base"):
    """A small run: the command line, and what it returns."""
    flags = {"task": task, "model": model, "weights": weights, "data": folder, "out": out}
    given = [f"--{name}={value}" for name, value in flags.items()]
    argv = [*given, "--length", "64", *map(str, more)]
    return argv, paper.main(argv)


# ---- classes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(roberta, tmp_path_factory):
    """A run of two seeds: its command line, its folder and its medians."""
    folder, out = sst2(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("out")
    argv, medians = train("sst2", roberta, folder, out, *LEARN, "--seeds", 2)
    return argv, out, medians


@pytest.mark.slow
def test_learns_classes_and_saves_the_adapter_of_the_best_epoch(run, roberta):
    """What is in the folder has the score that is in the table."""
    argv, out, medians = run
    rows = tables.read(out / "seeds.csv")
    scores = [row["accuracy"] for row in rows]
    assert len(scores) == 2 and min(scores) > 0.75
    assert medians == {"accuracy": pytest.approx(np.median(scores))}
    # 2 layers of A and B on query and value, and the head.
    assert {row["trained"] for row in rows} == {2 * 2 * 2 * 32 * 8 + 33 * 32 + 33 * 2}
    parsed = paper.parse(argv)
    recipe = paper.settle(table.recipe("roberta-base", "sst2"), parsed)
    loaded = pretrained.load(roberta, "roberta-base", scan=True)
    problem = paper.pose(loaded, recipe, parsed)
    method = paper.adapt(loaded, problem, recipe, parsed)
    base, like = paper.begin(method, loaded, problem, recipe, 1)
    adapter = checkpoint.restore(out / "seed-1", like=like, base=base)
    found = problem.dev(jax.tree_util.Partial(method.apply, base, adapter))
    assert found == {"accuracy": pytest.approx(scores[1])}


# ---- texts --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gpt_learns_its_answers(tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    Small(gpt, gpt.GPT, GPT).write(weights)
    train_tokenizer([texts.END], E2E).save(str(weights / "tokenizer.json"))
    header, *rows = E2E.splitlines(keepends=True)
    write(tmp_path, {"trainset.csv": "".join([header, *rows * 8])})
    write(tmp_path, dict.fromkeys(("devset.csv", "testset_w_refs.csv"), E2E))
    more = "--length 96 --epochs 12 --warmup 5 --batch 2 --learning-rate 1e-2 --rank 8 --seeds 1"
    given = weights, tmp_path, tmp_path / "out", *more.split()
    _, medians = train("e2e", *given, model="gpt2-medium")
    assert medians["bleu"] > 80
    written = (tmp_path / "out" / "seed-0.txt").read_text().splitlines()
    assert "The Eagle is a cheap coffee shop." in written
    assert len(written) == 2


# ---- recipes ------------------------------------------------------------------------------------
