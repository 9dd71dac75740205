"""`python examples/paper train`: from small files of the official formats to scores.

The checkpoints are small, of the real architectures, with tokenizers of the real kinds.
"""

import csv
import functools
import itertools
import math
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import bert, gpt
from paper import train as paper
from paper.methods import METHODS
from paper.tasks import glue, nlg, pretrained, problems, table, texts, training
from test_models import Small
from test_tasks import LAYOUTS, tsv, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jlora import checkpoint

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
ENCODER = (320, 32, 2, 4, 64, 66)
SMALL = {
    "roberta-base": Small(
        bert, bert.Bert, bert.Config(*ENCODER, 1, 1e-5, "roberta", 1, 0.0, 0.0, "lm")
    ),
    "gpt2-medium": Small(gpt, gpt.GPT, gpt.Config(400, 192, 2, 32, 4, dropout=0.0)),
}

# ---- files --------------------------------------------------------------------------------------


def train_tokenizer(special: list[str], text: str) -> Tokenizer:
    """Pairs of bytes, as those of RoBERTa and GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 3, trainer)
    return tokenizer


def make_tokenizer(name: str) -> Tokenizer:
    """Of RoBERTa or GPT-2."""
    if name.startswith("gpt"):
        return train_tokenizer([texts.END], E2E)
    words = [*FILLERS, *itertools.chain(*WORDS.values())]
    tokenizer = train_tokenizer(["<s>", "<pad>", "</s>", "<unk>"], " ".join(words))
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def write_checkpoint(folder: pathlib.Path, name: str) -> pathlib.Path:
    """A folder as Hugging Face's, of random weights."""
    SMALL[name].write(folder)
    make_tokenizer(name).save(str(folder / "tokenizer.json"))
    return folder


def sentence(rng: np.random.Generator, *kinds: int) -> str:
    """Two fillers, and a word of each kind, in any order."""
    words = [*rng.choice(FILLERS, 2), *(rng.choice(WORDS[kind]) for kind in kinds)]
    return " ".join(rng.permutation(words))


def sst2(folder: pathlib.Path, train: int = 128) -> pathlib.Path:
    """Class 1 is that of the good words."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("dev", 64)):
        labels = rng.permutation(np.arange(count) % 2)
        rows = [f"{sentence(rng, *[1 - label] * 2)}|{label}" for label in labels]
        write(folder, {f"SST-2/{split}.tsv": tsv("sentence|label", *rows)})
    return folder


def inference(folder: pathlib.Path, task: str) -> pathlib.Path:
    """MNLI or RTE: the words of the second sentence tell the class."""
    rng, spec = np.random.default_rng(0), glue.TASKS[task]
    header, row, *_ = LAYOUTS[task]
    given = row.split("|")
    columns = header.split("|")
    for split, count in (("train", 192), *((name, 48 + 3 * i) for i, name in enumerate(spec.dev))):
        rows = []
        for number in range(count):
            label = number % len(spec.classes)
            texts = {"sentence1": sentence(rng), "sentence2": sentence(rng, label, label)}
            values = {**dict(zip(columns, given, strict=True)), **texts}
            values |= {spec.label: spec.classes[label]}
            rows.append("|".join(values[name] for name in columns))
        write(folder, {f"{spec.folder}/{split}.tsv": tsv(header, *rows)})
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """A folder for each of the small models."""
    return {n: write_checkpoint(tmp_path_factory.mktemp(n), n) for n in SMALL}


def arguments(task: str, model: str, weights: Any, folder: Any, out: Any, *more: Any) -> list[str]:
    """A command line for a small run."""
    flags = {"task": task, "model": model, "weights": weights, "data": folder, "out": out}
    given = [str(x) for name, value in flags.items() for x in (f"--{name}", value)]
    return [*given, "--length", "64", *map(str, more)]


def rows_of(out: pathlib.Path) -> list[dict[str, str]]:
    with (out / "seeds.csv").open() as file:
        return list(csv.DictReader(file))


def stopped(*args: Any) -> str:
    """What the command says when it stops."""
    with pytest.raises(SystemExit) as info:
        paper.main([*map(str, args)])
    return str(info.value).removeprefix("stopped: ")


LEARN = ("--epochs", 4, "--batch", 16, "--learning-rate", 2e-2, "--alpha", 16, "--scan")

# ---- classes and scores -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(checkpoints, tmp_path_factory):
    """A run of two seeds: its command line, its folder and its medians."""
    folder, out = sst2(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("out")
    args = arguments("sst2", "roberta-base", checkpoints["roberta-base"], folder, out, *LEARN)
    return args, out, paper.main([*args, "--seeds", "2"])


def test_learns_classes(run):
    _, out, medians = run
    rows = rows_of(out)
    assert [row["seed"] for row in rows] == ["0", "1"]
    scores = [float(row["accuracy"]) for row in rows]
    assert min(scores) > 0.75
    assert medians == {"accuracy": pytest.approx(np.median(scores))}
    # 2 layers of A and B on query and value, and the head.
    assert {int(row["trained"]) for row in rows} == {2 * 2 * 2 * 32 * 8 + 33 * 32 + 33 * 2}


def test_saves_the_adapter_of_the_best_epoch(run, checkpoints):
    """What is in the folder has the score that is in the table."""
    args, out, _ = run
    parsed = paper.parse(args)
    recipe = paper.settle(table.recipe("roberta-base", "sst2"), parsed)
    loaded = pretrained.load(checkpoints["roberta-base"], "roberta-base", scan=True)
    problem = paper.pose(loaded, recipe, parsed)
    method = paper.adapt(loaded, problem, recipe, parsed)
    for row in rows_of(out)[1:]:
        seed = int(row["seed"])
        base, like = paper.begin(method, loaded, problem, recipe, seed)
        adapter = checkpoint.restore(out / f"seed-{seed}", like=like, base=base)
        assert checkpoint.read(out / f"seed-{seed}").rules == method.rules
        scores = problem.dev(jax.tree_util.Partial(method.apply, base, adapter))
        assert scores == {"accuracy": pytest.approx(float(row["accuracy"]))}
        assert problem.dev(jax.tree_util.Partial(method.apply, base, like)) != scores


@pytest.mark.slow
def test_goes_on_with_the_seeds_that_lack(run):
    """A seed that is there stays; one whose row was not written is trained again."""
    args, out, _ = run
    before = rows_of(out)
    path = out / "seeds.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))  # without seed 1
    kept = (out / "seed-0" / "jlora" / "metadata").stat().st_mtime_ns
    paper.main([*args, "--seeds", "2"])
    assert rows_of(out) == before  # to the last digit
    assert (out / "seed-0" / "jlora" / "metadata").stat().st_mtime_ns == kept
    was = path.read_text()
    paper.main([*args, "--seeds", "1"])
    assert path.read_text() == was


def test_other_settings_want_another_folder(run):
    args, out, _ = run
    assert stopped(*args, "--rank", "4", "--start", "none") == (
        f"`--out`: {out} has seeds of other settings: rank was 8, is 4; start was None, is 'none'. "
        "Give another folder."
    )


@pytest.mark.slow
def test_mnli_and_what_starts_from_it(checkpoints, tmp_path):
    """Both dev sets; RTE begins with MNLI's factors and a head of its own."""
    weights = checkpoints["roberta-base"]
    args = arguments("mnli", "roberta-base", weights, inference(tmp_path, "mnli"), tmp_path / "a")
    medians = paper.main([*args, *map(str, LEARN), "--seeds", "1"])
    assert list(medians) == ["accuracy", "accuracy_matched", "accuracy_mismatched"]
    assert min(medians.values()) > 0.5  # of three classes
    weighted = 48 * medians["accuracy_matched"] + 51 * medians["accuracy_mismatched"]
    assert medians["accuracy"] == pytest.approx(weighted / 99)

    start = tmp_path / "a" / "seed-0"
    args = arguments("rte", "roberta-base", weights, inference(tmp_path, "rte"), tmp_path / "b")
    still = ("--scan", "--epochs", "1", "--learning-rate", "1e-9", "--alpha", "16", "--seeds", "1")
    paper.main([*args, *still, "--start", str(start)])
    before, after = (checkpoint.restore(x)["params"] for x in (start, tmp_path / "b" / "seed-0"))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6),
        after["encoder"],
        before["encoder"],
    )
    assert (before["classifier"]["bias"].shape, after["classifier"]["bias"].shape) == ((3,), (2,))
    assert np.abs(before["pooler"]["kernel"] - after["pooler"]["kernel"]).max() > 0.01

    other = [*args, *still, "--start", start, "--rank", 4, "--out", tmp_path / "c"]
    said = stopped(*other)
    assert said.startswith(f"`like` does not have the form of the adapter in {start}:\n")
    assert "query/kernel/a: expected shape (2, 32, 8)" in said


# ---- texts --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gpt_learns_its_answers(checkpoints, tmp_path):
    header, *rows = E2E.splitlines(keepends=True)
    write(tmp_path, {"trainset.csv": "".join([header, *rows * 8])})
    write(tmp_path, dict.fromkeys(("devset.csv", "testset_w_refs.csv"), E2E))
    args = arguments("e2e", "gpt2-medium", checkpoints["gpt2-medium"], tmp_path, tmp_path / "out")
    more = "--length 96 --epochs 12 --warmup 5 --batch 2 --learning-rate 1e-2 --rank 8 --seeds 1"
    medians = paper.main([*args, *more.split()])
    assert next(iter(medians)) == "bleu_lower"
    assert medians["bleu"] > 80
    written = (tmp_path / "out" / "seed-0.txt").read_text().splitlines()
    assert "The Eagle is a cheap coffee shop." in written
    assert len(written) == 2


def test_webnlg_apart_by_category():
    known, other = (nlg.Example("p", ("a b c d",), category) for category in ("Food", "Sport"))
    scores = texts.score("webnlg", ["a b c d", "no"], [known, other], [known])
    assert scores["bleu_lower_seen"] == pytest.approx(100)
    assert scores["bleu_lower_unseen"] < 1
    upper = texts.score("webnlg", ["A B C D"], [known], [known])  # lower case is scored
    assert next(iter(upper.values())) == pytest.approx(100) and "bleu_lower_unseen" not in upper


# ---- methods ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, checkpoints, tmp_path):
    """Trains, saves, and starts another task."""
    weights, folder = checkpoints["roberta-base"], sst2(tmp_path, train=32)
    args = arguments("sst2", "roberta-base", weights, folder, tmp_path / "a", "--method", method)
    more = ["--epochs", "1", "--seeds", "1"]
    assert 0 <= paper.main([*args, *more])["accuracy"] <= 1
    args = arguments("rte", "roberta-base", weights, inference(tmp_path, "rte"), tmp_path / "b")
    more += ["--method", method, "--start", str(tmp_path / "a" / "seed-0"), "--limit", "16"]
    assert 0 <= paper.main([*args, *more])["accuracy"] <= 1


# ---- pieces -------------------------------------------------------------------------------------


def toy(scores: list[float], learning_rate: float = 0.1) -> training.Best:
    """One number learned in as many epochs as there are scores, of two steps each."""
    recipe = table.Recipe(learning_rate, batch=2, epochs=len(scores), length=8, rank=1, alpha=1)
    rows = [{"ids": np.ones(3, np.int32)}] * 4
    following = iter(scores)
    problem = problems.Problem(
        examples=4,
        outputs=0,
        inputs=("ids",),
        batches=functools.partial(problems.shuffled, rows, recipe, {"lengths": [8]}),
        loss=lambda logits, batch: jnp.square(logits - 1).mean(),
        dev=lambda model: {"score": next(following), "logit": model(jnp.ones(1)).item()},
    )

    def apply(base, adapter, ids, rngs=None):
        return adapter["x"] * ids

    trainer = training.trainer(apply, problem, recipe)
    return training.train(trainer, {}, {"x": jnp.zeros(())}, seed=0)


def test_the_best_epoch_counts():
    """The first of equal ones; an undefined correlation is the worst."""
    best = toy([0.5, 0.75, 0.75, math.nan])
    assert (best.epoch, best.scores["score"]) == (2, 0.75)
    assert best.adapter["x"] == best.scores["logit"] != toy([0.5, 0.6, 0.75]).adapter["x"]
    assert toy([math.nan, -1.0]).epoch == 2
    assert toy([math.nan, math.nan]).epoch == 1


def test_a_loss_that_is_no_number():
    with pytest.raises(FloatingPointError) as info:
        toy([0.5, 0.75], learning_rate=1e38)
    assert str(info.value) == (
        "seed 0, epoch 1: the loss is inf. Give a lower --learning-rate, or --dtype float32"
    )


def test_lists_every_recipe(capsys):
    assert paper.main(["--list"]) == {}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(table.RECIPES)
    first = "roberta-base mnli 0.0005 16 30 512 8 8 warmup_ratio=0.06 weight_decay=0.1 clip=1.0"
    assert lines[1].split() == first.split()
    assert lines[-1].startswith("minilm (ours)")


# ---- errors -------------------------------------------------------------------------------------


@pytest.fixture
def small(checkpoints, tmp_path):
    """Weights and data that may be damaged, and a command that would else work."""
    weights, folder = tmp_path / "weights", sst2(tmp_path / "data", train=16)
    shutil.copytree(checkpoints["roberta-base"], weights)
    args = arguments("sst2", "roberta-base", weights, folder, tmp_path / "out", "--seeds", 1)
    return weights, folder, args


def test_missing_files(small):
    weights, folder, args = small
    (folder / "SST-2" / "dev.tsv").unlink()
    assert stopped(*args).startswith(f"`{folder}/SST-2` holds ['train.tsv']: expected dev.tsv or")
    for name, said in {
        "model.safetensors": f"{weights} has neither model.safetensors nor model.safetensors.in",
        "tokenizer.json": f"`{weights}/tokenizer.json` is missing. Put the checkpoint's",
        "config.json": f"`{weights}/config.json` is missing. Put the checkpoint of roberta-base",
    }.items():
        (weights / name).unlink()
        assert stopped(*args).startswith(said)


def test_impossible_settings(small, checkpoints, tmp_path):
    weights, folder, args = small
    assert stopped(*args, "--task", "sst").startswith(
        "`task` of roberta-base must be one of mnli, sst2, mrpc,"
    )
    assert stopped(*args, "--length", 65) == (
        f"`--length`: expected at most 64, the positions of the model in {weights}, got 65"
    )
    assert stopped(*args, "--method", "pre_layer", "--sizes", "l_q=2") == (
        "`--sizes` of pre_layer: expected l_p=NUMBER, got 'l_q=2'"
    )
    assert "got scan=True" in stopped(*args, "--scan", "--method", "adapter_h")
    gpt2 = checkpoints["gpt2-medium"]
    assert stopped(*args, "--weights", gpt2) == (
        f"`{gpt2}/config.json`: expected model_type 'roberta', of roberta-base, got 'gpt2'"
    )
    args = arguments("e2e", "gpt2-medium", gpt2, folder, tmp_path / "out")
    write(folder, dict.fromkeys(("trainset.csv", "devset.csv", "testset_w_refs.csv"), E2E))
    assert stopped(*args) == "`length`: expected more than 64, for as many new tokens, got 64"


def test_no_adapter_to_start_from(small, tmp_path):
    _, _, args = small
    assert stopped(*args, "--task", "rte") == (
        "rte starts from the adapter of mnli: give --start "
        "out/paper/roberta-base-mnli-lora/seed-0, which --task mnli --model roberta-base --method "
        "lora makes, or --start none"
    )
    said = stopped(*args, "--start", tmp_path / "no")
    assert said == f"`path`: there is no checkpoint at {tmp_path / 'no'}."
