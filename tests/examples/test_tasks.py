"""`examples/paper/tasks`: files of every official format in, scores out.

The files are small, with the layouts of the real ones.
"""

import doctest
import functools
import json
import re

import data
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import beam, hf
from models.cache import Cache
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
    training,
)
from paper.tasks.files import FormatError
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
EACH_TASK = pytest.mark.parametrize("task", LAYOUTS)


def tsv(*lines: str) -> str:
    """A file of a header, if there is one, and rows; bars stand between columns."""
    text = "".join(f"{line}\n" for line in lines if line)
    return text.replace("|", "\t").replace("{", "").replace("}", "")


def example(task: str) -> glue.Example:
    """What the row of a layout holds."""
    _, row, _, label = LAYOUTS[task]
    return glue.Example(tuple(re.findall(r"{(.*?)}", row)), label)


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def jsonl(*records) -> str:
    return "".join(f"{json.dumps(record)}\n" for record in records)


def error(kind, function, *args, **kwargs) -> str:
    with pytest.raises(kind) as info:
        function(*args, **kwargs)
    return str(info.value)


def test_nine_tasks():
    assert list(LAYOUTS) == list(glue.TASKS) == list(metrics.GLUE)


@EACH_TASK
def test_glue(tmp_path, task):
    """As distributed, with ends of lines of either kind, and as JSON lines."""
    header, row, fields, label = LAYOUTS[task]
    spec, expected = glue.TASKS[task], example(task)
    record = dict(zip(fields, expected.texts, strict=True))
    labels = [label, spec.classes[label]] if spec.classes else [label]
    for split in spec.splits:
        for end, mark in (("\n", b""), ("\r\n", b"\xef\xbb\xbf")):
            content = mark + tsv(header, row, row).replace("\n", end).encode()
            write(tmp_path, {f"{spec.folder}/{split}.tsv": content})
            for folder in (tmp_path, tmp_path / spec.folder):
                assert glue.read(folder, task, split) == 2 * [expected]
        lines = [{**record, "label": given, "idx": 0} for given in labels]
        hub = split.replace("dev", "validation")
        write(tmp_path / "hub", {f"{spec.folder}/{hub}.jsonl": jsonl(*lines)})
        assert glue.read(tmp_path / "hub", task, split) == [expected] * len(labels)


def test_superglue_names_texts_otherwise(tmp_path):
    record = {"premise": "She is dead.", "hypothesis": "She lives.", "label": "not_entailment"}
    for name, split in (("train", "train"), ("val", "dev")):
        write(tmp_path, {f"RTE/{name}.jsonl": jsonl(record)})
        expected = glue.Example(("She is dead.", "She lives."), 1)
        assert glue.read(tmp_path, "rte", split) == [expected]


def test_missing_files_say_what_to_put_where(tmp_path):
    write(tmp_path, {"CoLA/train.tsv": ""})
    assert error(FileNotFoundError, glue.read, tmp_path, "cola", "dev") == (
        f"`{tmp_path}/CoLA` holds ['train.tsv']: expected dev.tsv or dev.jsonl or "
        "validation.jsonl or val.jsonl. Put the folder CoLA of GLUE as distributed, or the same "
        "split as JSON lines, there."
    )
    assert error(FileNotFoundError, nlg.read, tmp_path, "e2e", "test") == (
        f"`{tmp_path}` holds ['CoLA']: expected testset_w_refs.csv. Put the testset_w_refs.csv of "
        "the E2E data set there."
    )


def test_unknown_task_or_split(tmp_path):
    assert error(ValueError, glue.read, tmp_path, "sst", "dev") == (
        "`task` must be one of cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, got 'sst'"
    )
    assert error(ValueError, glue.read, tmp_path, "mnli", "dev") == (
        "`split` of mnli must be one of train, dev_matched, dev_mismatched, got 'dev'"
    )


def test_damaged_lines_of_qqp_are_left_out_with_a_warning(tmp_path):
    header, row, *_ = LAYOUTS["qqp"]
    path = tmp_path / "QQP" / "train.tsv"
    write(tmp_path, {"QQP/train.tsv": tsv(header, "134|3|4|What is", "this?|Why?|0", row)})
    with pytest.warns(UserWarning) as record:
        assert glue.read(tmp_path, "qqp", "train") == [example("qqp")]
    message = f"`{path}`: left out 2 lines with too few fields: [2, 3]"
    assert [str(w.message) for w in record] == [message]
    write(tmp_path, {"QQP/train.tsv": tsv(header, *["134|3|4|What is"] * 51)})
    assert error(FormatError, glue.read, tmp_path, "qqp", "train").endswith(
        "got 4 after 50 damaged lines, the most that there may be"
    )


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
    ("e2e", "train"): ("trainset.csv", E2E, TWO_RESTAURANTS),
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


FEW = "4 fields, 'index', 'sentence1', 'sentence2', 'label', got 3"
GOOD = '{"sentence": "a", "label": 1}'
NAN = tsv("sentence1|sentence2|score", "a|b|nan")
NO_FIELD = "an object with a field \"label\", got fields ['sentence']"
NO_NUMBER = 'a number or a name in the field "label", got True'
NO_CLASS = "0 to 1, or one of 'negative', 'positive', got -1"
NO_TRIPLE = WEBNLG_XML.replace("Ajoblanco | region", "Ajoblanco")
TRIPLE = "<mtriple>subject | property | object</mtriple>, got ['Ajoblanco"
TWO_TEXTS = json.dumps([{**DART[0], "tripleset": [["a", "b"]]}])
DART_FILE = "dart-v1-full-dev.json"
DAMAGE = [  # task, file, content, where the message says that it is, and what was expected there
    ("rte", "dev.tsv", "", ", line 1", "a header, got an empty file"),
    ("rte", "dev.tsv", tsv("index|sentence1|label"), ", line 1", "a header with 'sentence2'"),
    ("rte", "dev.tsv", tsv(RTE), "", "at least one example, got none"),
    ("rte", "dev.tsv", tsv(RTE, "0|a|b|entailment", "1|a|entailment"), ", line 3", FEW),
    ("rte", "dev.tsv", tsv(RTE, "0|a|b|1"), ", line 2", "one of 'entailment', 'not_entailment', g"),
    ("cola", "dev.tsv", tsv("gj04|2||Rain."), ", line 1", "0 to 1, or one of 'unacceptable', 'acc"),
    ("stsb", "dev.tsv", NAN, ", line 2", "a score from 0 to 5, got nan"),
    ("sst2", "dev.tsv", b"sentence\tlabel\nfa\xe7ade\t1\n", ", line 2", "UTF-8, got '"),
    ("sst2", "dev.jsonl", f"{GOOD}\n[1]\n", ", line 2", "a JSON object, got [1]"),
    ("sst2", "dev.jsonl", f'{GOOD}\n{{"sentence": "a"}}\n', ", line 2", NO_FIELD),
    ("sst2", "dev.jsonl", GOOD.replace("1", "true"), ", line 1", NO_NUMBER),
    ("sst2", "dev.jsonl", GOOD.replace("1", "-1"), ", line 1", NO_CLASS),
    ("e2e", "devset.csv", "mr,refs\n", ", line 1", "the header mr,ref, got mr,refs"),
    ("e2e", "devset.csv", "mr,ref\nname[a],b,c\n", ", line 2", "2 fields, got ['name[a]'"),
    ("e2e", "devset.csv", "mr,ref\nname[a,b\n", ", line 2", "mr as name[…], eatType[…]"),
    ("e2e", "devset.csv", 'mr,ref\nname[a],"b\n', ", line 2", "CSV, got unexpected end of"),
    ("webnlg", "dev/a.xml", "<benchmark>", ", line 1", "XML, got no element found"),
    ("webnlg", "dev/a.xml", "<html/>", "", "<benchmark>, got <html>"),
    ("webnlg", "dev/a.xml", NO_TRIPLE, ", entry Id2", TRIPLE),
    ("dart", DART_FILE, "{}", "", "a list, got dict"),
    ("dart", DART_FILE, "[\n{]", ", line 2", "JSON, got Expecting property"),
    ("dart", DART_FILE, TWO_TEXTS, ", item 1", "three texts a triple, got ['a', 'b']"),
]


@pytest.mark.parametrize(("task", "name", "content", "place", "message"), DAMAGE)
def test_damaged_files(tmp_path, task, name, content, place, message):
    reader = glue if task in LAYOUTS else nlg
    path = f"{glue.TASKS[task].folder}/{name}" if reader is glue else name
    write(tmp_path, {path: content})
    said = error(FormatError, reader.read, tmp_path, task, "dev")
    assert said.startswith(f"`{tmp_path / path}`{place}: expected {message}")


# ---- metrics ------------------------------------------------------------------------------------


def test_scores_of_classes():
    labels = np.array([1, 1, 1, 0, 0, 1, 0, 1])
    predictions = np.array([1, 0, 1, 0, 1, 1, 0, 1])  # 4 true positives, 2 negatives, 1 and 1 false
    expected = {"accuracy": 6 / 8, "f1": 4 / 5, "matthews": 7 / 15}
    two = ("accuracy", "f1")
    names = {"mrpc": two, "qqp": two, "cola": ("matthews", "accuracy")}
    for task in LAYOUTS.keys() - {"stsb"}:
        scores = metrics.glue(task, predictions, labels)
        assert tuple(scores) == names.get(task, ("accuracy",))  # the paper's first
        assert scores == pytest.approx({name: expected[name] for name in scores})


def test_nist_with_one_reference_is_nltks():
    from nltk.translate.nist_score import corpus_nist  # slow to import

    rng = np.random.default_rng(0)
    texts, references = ([rng.choice(list("abcdefgh"), n).tolist() for n in (8, 12)] for _ in "ab")
    references = [[reference] for reference in references]
    assert ngrams.nist(texts, references) == pytest.approx(corpus_nist(references, texts))
    assert ngrams.nist(texts, references) > 0.5
    assert ngrams.nist([[]], references[:1]) == 0


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
    assert list(scores) == ["bleu_lower", "bleu", "nist", "rouge_l", "cider", "ter"]
    assert scores["bleu"] == pytest.approx(48.530827, abs=1e-6)
    # What coco-caption (pycocoevalcap 1.2) computes from the same tokens.
    assert scores["cider"] == pytest.approx(3.493110954239988, rel=1e-12)
    assert scores["rouge_l"] == pytest.approx(72.22222222222221, rel=1e-12)
    perfect = metrics.generation(texts, [[text] for text in texts])
    assert (perfect["bleu"], perfect["rouge_l"]) == pytest.approx((100, 100))
    assert perfect["cider"] > scores["cider"] > 0
    assert perfect["nist"] > scores["nist"] > 0
    assert scores["ter"] > perfect["ter"] == 0
    fewer = [references[0][:1], *references[1:]]
    assert 0 < metrics.bleu(texts, fewer) <= scores["bleu"]
    upper = [text.upper() for text in texts]
    assert metrics.bleu(upper, references, lowercase=True) > metrics.bleu(upper, references)
    # One of four words must be inserted.
    assert metrics.ter(["the cat sat"], [["the cat sat down"]]) == pytest.approx(25)
    assert metrics.ter(["the cat sat"], [["a b", "the cat sat"]]) == 0


# ---- tokens -------------------------------------------------------------------------------------


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
    assert {row[name].dtype for row in rows for name in row} == {np.dtype(np.int32)}
    again = encoding.classification(texts, [1.5, 2, 0], tokenizer, 64)
    assert len(again[0]["ids"]) == 13  # the tokenizer was not changed
    assert again[0]["label"].dtype == np.float32


def test_prompts_and_answers(tokenizer):
    start, stop = 101, 102
    a, b, c = map(tokenizer.token_to_id, "abc")
    for length in (8, 4, 3):  # the prompt loses its beginning
        (row,) = encoding.generation([("a b", "c")], tokenizer, length, stop, start)
        ids = [a, b, start, c, stop][-length:]
        assert row["ids"].tolist() == ids
        assert row["counts"].tolist() == [0.0] * (len(ids) - 2) + [1, 1]
    assert encoding.generation([], tokenizer, 3, stop, start) == []
    said = error(ValueError, encoding.generation, [("a", "b c")], tokenizer, 3, stop, start)
    assert said == "`length` = 3: answer 0 has 2 tokens and needs 4: 'b c'"


# ---- batches ------------------------------------------------------------------------------------


def rows_of(*lengths):
    return [
        {"ids": np.arange(1, n + 1, dtype=np.int32), "label": np.array(i, np.float32)}
        for i, n in enumerate(lengths)
    ]


def labels_of(several):
    return [int(x) for b in several for x in b["label"][b["weight"] > 0]]


def test_batches_follow_from_seed_and_step():
    """Every epoch has every row once, in another order."""
    make = functools.partial(batches.batches, rows_of(*range(1, 11)), 4, [4, 16])
    made, again, other = (make(seed=s, epochs=n) for s, n in ((0, 3), (0, 5), (1, 3)))
    assert len(made) == 9
    epochs = [labels_of(made[i] for i in range(start, start + 3)) for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    for step in reversed(range(9)):
        jax.tree.map(np.testing.assert_array_equal, made[step], again[step])
    assert labels_of(made) != labels_of(other)
    assert labels_of(list(made)[4:]) == labels_of(made[i] for i in range(4, 9))


def test_padding():
    first, second = batches.batches(rows_of(3, 5, 2), 2, [8, 4], pads={"ids": 9})
    np.testing.assert_array_equal(
        first["ids"], [[1, 2, 3, 9, 9, 9, 9, 9], [1, 2, 3, 4, 5, 9, 9, 9]]
    )
    np.testing.assert_array_equal(
        first["mask"], [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    )
    np.testing.assert_array_equal(second["ids"], [[1, 2, 9, 9], [1, 2, 9, 9]])
    np.testing.assert_array_equal(first["weight"], [1, 1])
    np.testing.assert_array_equal(second["weight"], [1, 0])
    dtypes = {name: x.dtype.name for name, x in first.items()}
    assert dtypes == {"ids": "int32", "mask": "int32", "label": "float32", "weight": "float32"}


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


def has_repeats(ids, size):
    grams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    return size > 0 and len(set(grams)) < len(grams)


def brute_force(step, prompt, new_tokens, stop, penalty, no_repeat, prompt_counts):
    """All texts, finished or of the most tokens, by score."""
    texts = []

    def grow(ids, total):
        if ids and (ids[-1] in stop or len(ids) == new_tokens):
            texts.append(beam.Text(ids, total / len(ids) ** penalty))
            return
        given = np.array([[*prompt, *ids]])
        scores = beam.log_softmax(step(given, np.array([given.size]))[0])[0]
        for token in range(VOCAB):
            history = (*prompt, *ids, token) if prompt_counts else (*ids, token)
            if not has_repeats(history, no_repeat):
                grow((*ids, token), total + scores[token])

    grow((), 0.0)
    return sorted(texts, key=lambda text: -text.score)


@pytest.mark.parametrize("penalty", some([0.9, 0.0, 2.0, -1.0], 0.9))
@pytest.mark.parametrize(("no_repeat", "prompt_counts"), [(0, True), (2, False)])
@pytest.mark.parametrize("stop", [(STOP, 2), ()])
def test_many_beams_find_what_brute_force_finds(penalty, no_repeat, prompt_counts, stop):
    prompts = [(1, 2, 1), (0,)]
    rules = {"new_tokens": 4, "stop": stop, "penalty": penalty}
    rules |= {"no_repeat": no_repeat, "prompt_counts": prompt_counts}
    for seed in range(3):
        step = table_step(seed)
        found = beam.search(step, prompts, beams=VOCAB**4, **rules)
        for prompt, texts in zip(prompts, found, strict=True):
            expected = brute_force(step, prompt, **rules)
            assert len(texts) == len(expected) > 1
            np.testing.assert_allclose([t.score for t in texts], [t.score for t in expected])
            assert {t.ids for t in texts} == {t.ids for t in expected}
            assert texts[0].ids == expected[0].ids


def test_one_beam_is_greedy():
    def successor(ids, mask=None, *, cache):  # a model that counts on
        return 9.0 * jax.nn.one_hot(ids + 1, 20), cache

    def nothing(batch, slots):
        return Cache(*[jnp.zeros((1, batch, slots, 1, 1))] * 2, jnp.zeros(batch, jnp.int32))

    count = functools.partial(beam.greedy, jax.tree_util.Partial(successor), [[3], [6, 7], [1, 2]])
    assert count(nothing, 9, 5) == [[4, 5, 6, 7, 8], [8], [3, 4, 5, 6, 7]]
    assert count(nothing, 4, 3) == [[], [8, 9, 10], [3]]


def test_search_ends_early_and_keeps_one_shape():
    calls = []

    def step(ids, lengths, parents, state):
        calls.append((ids.shape, ids.dtype, lengths.dtype, lengths.tolist()))
        return np.tile([0.0, 0.0, 0.0, 20.0], (len(ids), 1)), state

    texts = beam.search(step, [(1,), (1, 2)], beams=2, new_tokens=50, stop=(STOP,), penalty=0.0)
    assert [several[0].ids for several in texts] == [(STOP,), (STOP,)]
    assert len(calls) < 5
    assert {call[:3] for call in calls} == {((4, 52), np.dtype(np.int32), np.dtype(np.int32))}
    assert [call[3] for call in calls[:2]] == [[1, 1, 2, 2], [2, 2, 3, 3]]
