"""`examples/paper/tasks`: files of every official format in, scores out.

The files are small, with the layouts of the real ones.
"""

import doctest
import functools
import json
import re

import data
import jax
import numpy as np
import pytest
from models import beam, hf
from paper.tasks import (
    batches,
    encoding,
    files,
    glue,
    metrics,
    ngrams,
    nlg,
    problems,
    seeds,
    table,
    texts,
    training,
)
from small import some

MODULES = [hf, batches, beam, files, ngrams, nlg, problems, seeds, table, training]


@pytest.mark.parametrize("module", MODULES)
def test_docstrings(module):
    results = doctest.testmod(module)
    assert results.attempted > results.failed == 0


# ---- GLUE ---------------------------------------------------------------------------------------

ONE, TWO, RTE = ["sentence"], ["sentence1", "sentence2"], "index|sentence1|sentence2|label"
MRPC = "Quality|#1 ID|#2 ID|#1 String|#2 String"
QQP = "id|qid1|qid2|question1|question2|is_duplicate"
STSB = "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2|score"
MNLI = "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse|sentence1_parse|"
MNLI += "sentence2_parse|sentence1|sentence2|label1|gold_label"
ITS_WET = "0|1|1n|f|( a )|( b )|(ROOT a)|(ROOT b)|{It rains.}|{It's wet.}|neutral|neutral"
WHO = "5|{Who?}|{He did, in 1999.}|entailment"
# Of a task: header, a row with its texts in braces, their names in JSON lines, the label.
LAYOUTS = {
    "cola": ("", 'gj04|1||{"Nobody expected rain," he said}', ONE, 1),
    "sst2": ("sentence|label", "{a witty movie \u2028 }|1", ONE, 1),
    "mrpc": (MRPC, "0|702|703|{He said \"no.}|{She said 'yes'.}", TWO, 0),
    "stsb": (STSB, "3|captions|MSRvid|2012|0004|none|none|{A cat.}|{A cat is.}|4.750", TWO, 4.75),
    "qqp": (QQP, "133|9|10|{Why? What is \x0b ∞}|{Why?}|1", ["question1", "question2"], 1),
    "mnli": (MNLI, ITS_WET, ["premise", "hypothesis"], 1),
    "qnli": ("index|question|sentence|label", WHO, ["question", "sentence"], 0),
    "rte": (RTE, "0|{No arms were found.}|{Arms were.}|not_entailment", TWO, 1),
    "wnli": (RTE, "0|{I pulled the pin.}|{The pin had a hole.}|0", TWO, 0),
}


def tsv(*lines: str) -> str:
    """A file of a header, if there is one, and rows; bars stand between columns."""
    text = "".join(f"{line}\n" for line in lines if line)
    return text.replace("|", "\t").replace("{", "").replace("}", "")


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.mark.parametrize("task", LAYOUTS)
def test_glue(tmp_path, task):
    """As distributed, with ends of lines of either kind, and as JSON lines."""
    header, row, fields, label = LAYOUTS[task]
    assert LAYOUTS.keys() == glue.TASKS.keys() == metrics.GLUE.keys()
    spec, found = glue.TASKS[task], tuple(re.findall(r"{(.*?)}", row))
    expected, record = glue.Example(found, label), dict(zip(fields, found, strict=True))
    labels = [label, spec.classes[label]] if spec.classes else [label]
    for split in spec.splits:
        for end, mark in (("\n", b""), ("\r\n", b"\xef\xbb\xbf")):
            content = mark + tsv(header, row, row).replace("\n", end).encode()
            write(tmp_path, {f"{spec.folder}/{split}.tsv": content})
            for folder in (tmp_path, tmp_path / spec.folder):
                assert glue.read(folder, task, split) == 2 * [expected]
        lines = [json.dumps({**record, "label": given, "idx": 0}) + "\n" for given in labels]
        hub = split.replace("dev", "validation")
        write(tmp_path / "hub", {f"{spec.folder}/{hub}.jsonl": "".join(lines)})
        assert glue.read(tmp_path / "hub", task, split) == [expected] * len(labels)


def test_damaged_lines_of_qqp_are_left_out_with_a_warning(tmp_path):
    header, row, *_ = LAYOUTS["qqp"]
    write(tmp_path, {"QQP/train.tsv": tsv(header, "134|3|4|What is", "this?|Why?|0", row)})
    with pytest.warns(UserWarning, match=r"left out 2 lines with too few fields: \[2, 3\]"):
        assert len(glue.read(tmp_path, "qqp", "train")) == 1


# ---- generation: files --------------------------------------------------------------------------

E2E = """mr,ref
"name[The Eagle], eatType[coffee shop], priceRange[less than £20]","The Eagle, a ""cheap"" shop."
"name[The Mill], near[Café Sicilia]",The Mill is near Café Sicilia.
"name[The Eagle], eatType[coffee shop], priceRange[less than £20]",Cheap coffee: The Eagle.
"""
EAGLE = "name : The Eagle | eatType : coffee shop | priceRange : less than £20"
WEBNLG_XML = """<?xml version="1.0" ?>
<benchmark><entries>
<entry category="Airport" eid="Id1" shape="(X (X))" shape_type="NA" size="2">
 <originaltripleset><otriple>Aarhus_Airport | city | Aarhus</otriple></originaltripleset>
 <modifiedtripleset>
  <mtriple>Aarhus_Airport | cityServed | "Aarhus, Denmark"</mtriple>
  <mtriple>Aarhus | leader | Jacob &amp; Co</mtriple>
 </modifiedtripleset>
 <lex comment="good" lid="Id1">Aarhus airport serves Aarhus.</lex>
 <lex comment="bad" lid="Id2">Airport.</lex>
 <lex comment="good" lid="Id3" lang="ru">Аэропорт.</lex>
 <lex comment="good" lid="Id4">Jacob leads Aarhus.</lex>
</entry>
<entry category="Food" eid="Id2" size="1">
 <modifiedtripleset><mtriple>Ajoblanco | region | Andalusia</mtriple></modifiedtripleset>
 <lex comment="bad" lid="Id1">Ajo.</lex>
</entry>
</entries></benchmark>
"""
AIRPORT = 'Aarhus_Airport : cityServed : "Aarhus, Denmark" | Aarhus : leader : Jacob & Co'
WEBNLG = [nlg.Example(AIRPORT, ("Aarhus airport serves Aarhus.", "Jacob leads Aarhus."), "Airport")]
DART_TRIPLES = [["Mars Hill College", "JOINED", "1973"], ["[TABLECONTEXT]", "TITLE", "Teams"]]
DART_TEXTS = ("A school joined in 1973.", "Mars Hill College joined.")
DART = [{"tripleset": DART_TRIPLES, "annotations": [{"source": "", "text": t} for t in DART_TEXTS]}]
MARS = "Mars Hill College : joined : 1973 | [TABLECONTEXT] : title : Teams"
TWO_RESTAURANTS = [
    nlg.Example(EAGLE, ('The Eagle, a "cheap" shop.', "Cheap coffee: The Eagle.")),
    nlg.Example("name : The Mill | near : Café Sicilia", ("The Mill is near Café Sicilia.",)),
]
DATASETS = {  # task, split -> the file, and the examples in it
    ("e2e", "dev"): ("devset.csv", E2E, TWO_RESTAURANTS),
    ("e2e", "test"): ("testset_w_refs.csv", E2E, TWO_RESTAURANTS),
    ("webnlg", "train"): ("train/2triples/Airport.xml", WEBNLG_XML, WEBNLG),
    ("webnlg", "test"): ("test/testdata_with_lex.xml", WEBNLG_XML, WEBNLG),
    ("dart", "dev"): (
        *("dart-v1.1.1-full-dev.json", json.dumps(DART)),
        [nlg.Example(MARS, DART_TEXTS)],
    ),
}


@pytest.mark.parametrize(("task", "split"), DATASETS)
def test_prompts_and_references(tmp_path, task, split):
    name, content, expected = DATASETS[task, split]
    foreign = WEBNLG_XML.replace("Ajoblanco", "Gazpacho")  # a part of the test set
    write(tmp_path, {name: content, "test/testdata_unseen_with_lex.xml": foreign})
    assert nlg.read(tmp_path, task, split) == expected


NO_TRIPLE = WEBNLG_XML.replace("Ajoblanco | region", "Ajoblanco")
# Task, file, content, and where the message says that it is wrong: none becomes an example.
DAMAGE = [
    ("rte", "RTE/dev.tsv", tsv(RTE, "0|a|b|entailment", "1|a|entailment"), "dev.tsv`, line 3"),
    ("cola", "CoLA/dev.tsv", tsv("gj04|2||Rain."), "dev.tsv`, line 1"),
    ("stsb", "STS-B/dev.tsv", tsv("sentence1|sentence2|score", "a|b|nan"), "dev.tsv`, line 2"),
    ("sst2", "SST-2/dev.tsv", b"sentence\tlabel\nfa\xe7ade\t1\n", "dev.tsv`, line 2"),
    ("sst2", "SST-2/dev.jsonl", '{"sentence": "a", "label": true}', "dev.jsonl`, line 1"),
    ("e2e", "devset.csv", "mr,ref\nname[a,b\n", "devset.csv`, line 2"),
    ("webnlg", "dev/a.xml", NO_TRIPLE, "a.xml`, entry Id2"),
]


@pytest.mark.parametrize(("task", "name", "content", "place"), DAMAGE)
def test_damaged_files(tmp_path, task, name, content, place):
    write(tmp_path, {name: content})
    with pytest.raises(files.FormatError, match=f"{place}: expected "):
        (glue if task in LAYOUTS else nlg).read(tmp_path, task, "dev")


# ---- metrics ------------------------------------------------------------------------------------


def test_nist_with_one_reference_is_nltks():
    from nltk.translate.nist_score import corpus_nist  # slow to import

    rng = np.random.default_rng(0)
    texts, references = ([rng.choice(list("abcdefgh"), n).tolist() for n in (8, 12)] for _ in "ab")
    references = [[reference] for reference in references]
    assert ngrams.nist(texts, references) == pytest.approx(corpus_nist(references, texts))
    assert ngrams.nist(texts, references) > 0.5


# The example of sacrebleu's documentation: two references for two sentences, one for the third.
SACREBLEU = (
    ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."],
    [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ],
)


def test_generation_scores():
    texts, references = SACREBLEU
    scores = metrics.generation(texts, references)
    assert scores["bleu"] == pytest.approx(48.530827, abs=1e-6)
    # What coco-caption (pycocoevalcap 1.2) computes from the same tokens.
    assert scores["cider"] == pytest.approx(3.493110954239988, rel=1e-12)
    assert scores["rouge_l"] == pytest.approx(72.22222222222221, rel=1e-12)
    perfect = metrics.generation(texts, [[text] for text in texts])
    assert (perfect["bleu"], perfect["rouge_l"]) == pytest.approx((100, 100))
    fewer = [references[0][:1], *references[1:]]
    assert 0 < metrics.bleu(texts, fewer) <= scores["bleu"]
    # One of four words must be inserted.
    assert metrics.ter(["the cat sat"], [["the cat sat down"]]) == pytest.approx(25)


def test_webnlg_apart_by_category():
    known, other = (nlg.Example("p", ("a b c d",), category) for category in ("Food", "Sport"))
    scores = texts.score("webnlg", ["A B C D", "no"], [known, other], [known])
    assert scores["bleu_lower_seen"] == pytest.approx(100)  # lower case is scored
    assert scores["bleu_lower_unseen"] < 1


# ---- tokens and batches -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return encoding.load_tokenizer(data.minilm())


def test_pairs_are_cut_from_the_longer_text(tokenizer):
    texts = [("a b c d e f g h", "x y"), ("one text only",), ("a", "b")]
    rows = encoding.classification(texts, [1, 2, 0], tokenizer, 8)
    tokens = [" ".join(map(tokenizer.id_to_token, row["ids"])) for row in rows]
    assert tokens == [
        "[CLS] a b c [SEP] x y [SEP]",
        "[CLS] one text only [SEP]",
        "[CLS] a [SEP] b [SEP]",
    ]
    assert rows[0]["types"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert [row["label"].item() for row in rows] == [1, 2, 0]


def test_prompts_and_answers(tokenizer):
    """What counts is the answer and its end; the prompt loses its beginning."""
    start, stop = 101, 102
    a, b, c = map(tokenizer.token_to_id, "abc")
    for length in (8, 4, 3):
        (row,) = encoding.generation([("a b", "c")], tokenizer, length, stop, start)
        ids = [a, b, start, c, stop][-length:]
        assert row["ids"].tolist() == ids
        assert row["counts"].tolist() == [0.0] * (len(ids) - 2) + [1, 1]


def test_batches_follow_from_seed_and_step():
    """Every epoch has every row once, in another order; padding has no weight and no mask."""
    rows = [{"ids": np.arange(1, n + 1), "label": np.array(n - 1)} for n in range(1, 11)]
    make = functools.partial(batches.batches, rows, 4, [4, 16], pads={"ids": 99})
    made, again, other = (make(seed=s, epochs=n) for s, n in ((0, 3), (0, 5), (1, 3)))
    assert len(made) == 9

    def labels(several):
        return [int(x) for b in several for x in b["label"][b["weight"] > 0]]

    epochs = [labels(made[i] for i in range(start, start + 3)) for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    for step in reversed(range(9)):
        jax.tree.map(np.testing.assert_array_equal, made[step], again[step])
        np.testing.assert_array_equal(made[step]["mask"], made[step]["ids"] < 99)
        assert (made[step]["mask"].sum(1) == made[step]["label"] + 1).all()
    assert labels(made) != labels(other)
    assert labels(list(made)[4:]) == labels(made[i] for i in range(4, 9))


# ---- beam search --------------------------------------------------------------------------------

VOCAB, STOP = 4, 3


def table_step(seed):
    """Logits that depend on the last two tokens; row by row as a model's."""
    logits = np.random.default_rng(seed).normal(0, 1.5, (VOCAB, VOCAB, VOCAB))

    def step(ids, lengths, parents=None, state=None):
        rows = np.arange(len(ids))
        before = np.where(lengths > 1, ids[rows, np.maximum(lengths - 2, 0)], 0)
        return logits[before, ids[rows, lengths - 1]], state

    return step


def brute_force(step, prompt, new_tokens, stop, penalty, no_repeat, prompt_counts):
    """All texts, finished or of the most tokens, by score."""
    texts, before = [], prompt if prompt_counts else ()

    def grow(ids, total):
        grams = list(zip(*([*before, *ids][i:] for i in range(no_repeat)), strict=False))
        if len(set(grams)) < len(grams):
            return
        if ids and (ids[-1] in stop or len(ids) == new_tokens):
            texts.append(beam.Text(ids, total / len(ids) ** penalty))
            return
        given = np.array([[*prompt, *ids]])
        scores = beam.log_softmax(step(given, np.array([given.size]))[0])[0]
        for token in range(VOCAB):
            grow((*ids, token), total + scores[token])

    grow((), 0.0)
    return sorted(texts, key=lambda text: -text.score)


@pytest.mark.parametrize("penalty", some([0.9, 0.0, 2.0, -1.0], 0.9))
@pytest.mark.parametrize(("no_repeat", "prompt_counts"), [(0, True), (2, False)])
@pytest.mark.parametrize("stop", [(STOP, 2), ()])
def test_many_beams_find_what_brute_force_finds(penalty, no_repeat, prompt_counts, stop):
    prompts, step = [(1, 2, 1), (0,)], table_step(0)
    rules = {"new_tokens": 4, "stop": stop, "penalty": penalty}
    rules |= {"no_repeat": no_repeat, "prompt_counts": prompt_counts}
    found = beam.search(step, prompts, beams=VOCAB**4, **rules)
    for prompt, several in zip(prompts, found, strict=True):
        expected = brute_force(step, prompt, **rules)
        assert len(several) == len(expected) > 1
        np.testing.assert_allclose([t.score for t in several], [t.score for t in expected])
        assert {t.ids for t in several} == {t.ids for t in expected}
        assert several[0].ids == expected[0].ids
