"""`examples/paper/tasks`: files of every official format in, scores out.

The files are small, with the layouts of the real ones.
"""

import doctest
import json
import math
import re

import pytest
from models import beam, hf
from paper.tasks import (
    batches,
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


# ---- rows ---------------------------------------------------------------------------------------


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


# ---- metrics ------------------------------------------------------------------------------------


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
    written, references = SACREBLEU
    scores = metrics.generation(written, references)
    assert scores["bleu"] == pytest.approx(48.530827, abs=1e-6)
    # What coco-caption (pycocoevalcap 1.2) computes from the same tokens.
    assert scores["cider"] == pytest.approx(3.493110954239988, rel=1e-12)
    assert scores["rouge_l"] == pytest.approx(72.22222222222221, rel=1e-12)
    perfect = metrics.generation(written, [[text] for text in written])
    assert (perfect["bleu"], perfect["rouge_l"]) == pytest.approx((100, 100))
    fewer = [references[0][:1], *references[1:]]
    assert 0 < metrics.bleu(written, fewer) <= scores["bleu"]
    # Information of log2(3) and log2(3/2) bits in two tokens, halved as a third of them is lacking.
    assert metrics.nist(["a b"], [["a b b"]]) == pytest.approx(math.log2(4.5) / 4)
    given = [nlg.Example("", (text,), text[0]) for text in ("a b c d e", "v w x y z")]
    found = texts.score("webnlg", ["a b c d e", "1 2 3 4 5"], given, given[:1])
    assert found["bleu_lower_seen"] == pytest.approx(100) and found["bleu_lower_unseen"] < 10
    # One of four words must be inserted.
    assert metrics.ter(["the cat sat"], [["the cat sat down"]]) == pytest.approx(25)
