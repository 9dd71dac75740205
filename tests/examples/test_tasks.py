"""`examples/tasks`: files of every official format in, scores out.

The files are small, with the layouts of the real ones.
"""

import dataclasses
import doctest
import functools
import json
import math
import re
import warnings

import data
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import two_layers
from models import bert, gpt
from nltk.translate.nist_score import corpus_nist
from tasks import batches, beam, encoding, files, glue, metrics, ngrams, nlg, table, wikisql
from tasks.files import FormatError


@pytest.mark.parametrize("module", [batches, beam, files, ngrams, nlg, table, wikisql])
def test_docstrings(module):
    results = doctest.testmod(module)
    assert results.attempted > results.failed == 0


# ---- GLUE ---------------------------------------------------------------------------------------

MNLI = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse "
MNLI += "sentence2_parse sentence1 sentence2 "
# Task: header of train and dev, a row, header of test, a row, fields of JSON lines, the example.
LAYOUTS = {
    "cola": (
        "",
        'gj04|1||"Nobody expected rain," he said',
        "index sentence",
        '7|"Nobody expected rain," he said',
        ["sentence"],
        (('"Nobody expected rain," he said',), 1),
    ),
    "sst2": (
        "sentence label",
        "a gorgeous , witty movie \u2028 |1",
        "index sentence",
        "0|a gorgeous , witty movie \u2028 ",
        ["sentence"],
        (("a gorgeous , witty movie \u2028 ",), 1),
    ),
    "mrpc": (
        "Quality,#1 ID,#2 ID,#1 String,#2 String",
        "0|702876|702977|He said \"no.|She said 'yes'.",
        "index,#1 ID,#2 ID,#1 String,#2 String",
        "4|702876|702977|He said \"no.|She said 'yes'.",
        ["sentence1", "sentence2"],
        (('He said "no.', "She said 'yes'."), 0),
    ),
    "stsb": (
        "index genre filename year old_index source1 source2 sentence1 sentence2 score",
        "3|main-captions|MSRvid|2012test|0004|none|none|A cat plays.|A cat is playing.|4.750",
        "index genre filename year old_index source1 source2 sentence1 sentence2",
        "3|main-captions|MSRvid|2012test|0004|none|none|A cat plays.|A cat is playing.",
        ["sentence1", "sentence2"],
        (("A cat plays.", "A cat is playing."), 4.75),
    ),
    "qqp": (
        "id qid1 qid2 question1 question2 is_duplicate",
        "133|9|10|Why? What is \x0b ∞|Why?|1",
        "id question1 question2",
        "0|Why? What is \x0b ∞|Why?",
        ["question1", "question2"],
        (("Why? What is \x0b ∞", "Why?"), 1),
    ),
    "mnli": (
        f"{MNLI}label1 gold_label",
        "0|31|31n|fiction|( a )|( b )|(ROOT a)|(ROOT b)|It rains.|It's wet.|neutral|neutral",
        MNLI.strip(),
        "0|31|31n|fiction|( a )|( b )|(ROOT a)|(ROOT b)|It rains.|It's wet.",
        ["premise", "hypothesis"],
        (("It rains.", "It's wet."), 1),
    ),
    "qnli": (
        "index question sentence label",
        "5|Who?|He did, in 1999.|entailment",
        "index question sentence",
        "5|Who?|He did, in 1999.",
        ["question", "sentence"],
        (("Who?", "He did, in 1999."), 0),
    ),
    "rte": (
        "index sentence1 sentence2 label",
        "0|No weapons were found.|Weapons were found.|not_entailment",
        "index sentence1 sentence2",
        "0|No weapons were found.|Weapons were found.",
        ["sentence1", "sentence2"],
        (("No weapons were found.", "Weapons were found."), 1),
    ),
    "wnli": (
        "index sentence1 sentence2 label",
        "0|I pulled the pin; it had a hole.|The pin had a hole.|0",
        "index sentence1 sentence2",
        "0|I pulled the pin; it had a hole.|The pin had a hole.",
        ["sentence1", "sentence2"],
        (("I pulled the pin; it had a hole.", "The pin had a hole."), 0),
    ),
}
EACH_TASK = pytest.mark.parametrize("task", LAYOUTS)


def tsv(header: str, *rows: str) -> str:
    """A file: the columns of the header apart by commas or blanks, those of rows by bars."""
    header = "\t".join(header.split(",") if "," in header else header.split())
    return "".join(f"{line}\n" for line in [header, *(r.replace("|", "\t") for r in rows)] if line)


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
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_glue_as_distributed(tmp_path, task, end, mark):
    header, row, test_header, test_row, _, (texts, label) = LAYOUTS[task]
    spec = glue.TASKS[task]
    for split in spec.splits:
        given = (test_header, test_row) if split.startswith("test") else (header, row)
        content = mark + tsv(*given, given[1]).replace("\n", end).encode()
        write(tmp_path, {f"{spec.folder}/{split}.tsv": content})
    for folder in (tmp_path, tmp_path / spec.folder):
        for split in spec.splits:
            expected = None if split.startswith("test") else label
            assert glue.read(folder, task, split) == 2 * [glue.Example(texts, expected)]


@EACH_TASK
def test_glue_as_json_lines(tmp_path, task):
    *_, fields, (texts, label) = LAYOUTS[task]
    spec = glue.TASKS[task]
    record = dict(zip(fields, texts, strict=True))
    labels = [label, spec.classes[label]] if spec.classes else [label]
    for split in spec.splits:
        hub = split.replace("dev", "validation")
        lines = [{**record, "label": given, "idx": 0} for given in labels]
        lines = [{**record, "label": -1}, record] if split.startswith("test") else lines
        write(tmp_path, {f"{spec.folder}/{hub}.jsonl": jsonl(*lines)})
        expected = [None, None] if split.startswith("test") else [label] * len(labels)
        assert glue.read(tmp_path, task, split) == [glue.Example(texts, e) for e in expected]


def test_superglue_names_texts_otherwise(tmp_path):
    record = {"premise": "Dana Reeve is dead.", "hypothesis": "She lives.", "idx": 0}
    record["label"] = "not_entailment"
    write(tmp_path, {"RTE/train.jsonl": jsonl(record)})
    expected = glue.Example(("Dana Reeve is dead.", "She lives."), 1)
    assert glue.read(tmp_path, "rte", "train") == [expected]
    write(tmp_path, {"RTE/val.jsonl": jsonl(record)})
    assert glue.read(tmp_path, "rte", "dev") == [expected]


@pytest.mark.parametrize(
    ("task", "name", "content"),
    [
        ("cola", "CoLA/train.tsv", ""),
        ("sst2", "SST-2/train.tsv", "sentence\tlabel\n"),
        ("rte", "RTE/train.jsonl", ""),
    ],
)
def test_files_without_examples(tmp_path, task, name, content):
    write(tmp_path, {name: content})
    said = error(FormatError, glue.read, tmp_path, task, "train")
    assert said == f"`{tmp_path / name}`: expected at least one example, got none"


def test_missing_files_say_what_to_put_where(tmp_path):
    source = "the folder CoLA of GLUE as distributed, or the same split as JSON lines,"
    assert error(FileNotFoundError, glue.read, tmp_path / "no", "cola", "dev") == (
        f"`{tmp_path}/no` is no folder: expected dev.tsv or dev.jsonl or validation.jsonl or "
        f"val.jsonl. Put {source} there."
    )
    write(tmp_path, {"CoLA/train.tsv": ""})
    assert error(FileNotFoundError, glue.read, tmp_path, "cola", "dev") == (
        f"`{tmp_path}/CoLA` holds ['train.tsv']: expected dev.tsv or dev.jsonl or "
        f"validation.jsonl or val.jsonl. Put {source} there."
    )


def test_two_files_of_one_split(tmp_path):
    write(tmp_path, {"RTE/dev.tsv": "", "RTE/validation.jsonl": ""})
    assert error(ValueError, glue.read, tmp_path, "rte", "dev") == (
        f"`{tmp_path}/RTE` holds ['dev.tsv', 'validation.jsonl']: expected one of them only."
    )


def test_unknown_task_or_split(tmp_path):
    assert error(ValueError, glue.read, tmp_path, "sst", "dev") == (
        "`task` must be one of cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, got 'sst'"
    )
    assert error(ValueError, glue.read, tmp_path, "mnli", "dev") == (
        "`split` of mnli must be one of train, dev_matched, dev_mismatched, test_matched, "
        "test_mismatched, got 'dev'"
    )


RTE = "index sentence1 sentence2 label"
DAMAGE = [  # task, content of dev.tsv, the message after the name of the file
    ("rte", "", ", line 1: expected a header, got an empty file"),
    (
        "rte",
        tsv("index sentence1 label", "0|a|entailment"),
        ", line 1: expected a header with 'sentence2', got 'index', 'sentence1', 'label'",
    ),
    (
        "rte",
        tsv(RTE, "0|a|b|entailment", "1|a|entailment"),
        ", line 3: expected 4 fields, 'index', 'sentence1', 'sentence2', 'label', got 3",
    ),
    (
        "rte",
        tsv(RTE, "0|a|b|entailment|?"),
        ", line 2: expected 4 fields, 'index', 'sentence1', 'sentence2', 'label', got 5",
    ),
    (
        "rte",
        tsv(RTE, "0|a|b|1"),
        ", line 2: expected one of 'entailment', 'not_entailment', got 1",
    ),
    (
        "cola",
        "gj04\t2\t\tThis rains.\n",
        ", line 1: expected 0 to 1, or one of 'unacceptable', 'acceptable', got 2",
    ),
    ("stsb", tsv("sentence1 sentence2 score", "a|b|5.1"), ", line 2: expected a score from 0 to 5"),
    ("stsb", tsv("sentence1 sentence2 score", "a|b|nan"), ", line 2: expected a score from 0 to 5"),
    ("stsb", tsv("sentence1 sentence2 score", "a|b|"), ", line 2: expected a score from 0 to 5"),
    ("sst2", b"sentence\tlabel\nfa\xe7ade\t1\n", ", line 2: expected UTF-8, got 'utf-8' codec"),
]


@pytest.mark.parametrize(("task", "content", "message"), DAMAGE)
def test_damaged_tsv(tmp_path, task, content, message):
    folder = glue.TASKS[task].folder
    write(tmp_path, {f"{folder}/dev.tsv": content})
    said = error(FormatError, glue.read, tmp_path, task, "dev")
    assert said.startswith(f"`{tmp_path}/{folder}/dev.tsv`{message}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "a JSON object, got an empty line"),
        ("[1]", "a JSON object, got [1]"),
        ('{"a": 1', 'a JSON object, got {"a": 1'),
        ('{"sentence": "a"}', "an object with a field \"label\", got fields ['sentence']"),
        ('{"sentence": 1, "label": 1}', 'text in the field "sentence", got 1'),
        ('{"sentence": "a", "label": -1}', "0 to 1, or one of 'negative', 'positive', got -1"),
        ('{"sentence": "a", "label": true}', 'a number or a name in the field "label", got True'),
        ('{"sentence": "a", "label": 1.0}', "0 to 1, or one of 'negative', 'positive', got 1.0"),
    ],
)
def test_damaged_json_lines(tmp_path, line, message):
    good = '{"sentence": "a", "label": 1}\n'
    write(tmp_path, {"SST-2/train.jsonl": f"{good}{line}\n"})
    said = error(FormatError, glue.read, tmp_path, "sst2", "train")
    assert said == f"`{tmp_path}/SST-2/train.jsonl`, line 2: expected {message}"


def test_damaged_lines_of_qqp_are_left_out_with_a_warning(tmp_path):
    header, row, *_, (texts, label) = LAYOUTS["qqp"]
    path = tmp_path / "QQP" / "train.tsv"
    write(tmp_path, {"QQP/train.tsv": tsv(header, "134|3|4|What is", "this?|Why?|0", row)})
    with pytest.warns(UserWarning) as record:
        assert glue.read(tmp_path, "qqp", "train") == [glue.Example(texts, label)]
    message = f"`{path}`: left out 2 lines with too few fields: [2, 3]"
    assert [str(w.message) for w in record] == [message]
    assert error(FormatError, glue.read, tmp_path, "qqp", "train", damaged=1) == (
        f"`{path}`, line 3: expected 6 fields, 'id', 'qid1', 'qid2', 'question1', 'question2', "
        "'is_duplicate', got 3 after 1 damaged lines, the most that `damaged` allows"
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
TRIPLES = [
    {"subject": "Aarhus_Airport", "property": "cityServed", "object": '"Aarhus, Denmark"'},
    {"subject": "Aarhus", "property": "leader", "object": "Jacob & Co"},
]
LEX = [
    {"comment": "good", "lex": "Aarhus airport serves Aarhus.", "xml_id": "Id1", "lang": ""},
    {"comment": "bad", "lex": "Airport.", "xml_id": "Id2", "lang": ""},
    {"comment": "good", "lex": "Jacob leads Aarhus.", "xml_id": "Id4", "lang": ""},
]
WEBNLG_JSON = {
    "entries": [
        {
            "1": {
                "category": "Airport",
                "size": "2",
                "originaltriplesets": {"originaltripleset": [TRIPLES]},
                "modifiedtripleset": TRIPLES,
                "lexicalisations": LEX,
            }
        }
    ]
}
WEBNLG = [nlg.Example(AIRPORT, ("Aarhus airport serves Aarhus.", "Jacob leads Aarhus."), "Airport")]
DART = [
    {
        "tripleset": [
            ["Mars Hill College", "JOINED", "1973"],
            ["[TABLECONTEXT]", "TITLE", "Teams"],
        ],
        "subtree_was_extended": False,
        "annotations": [
            {"source": "WikiTableQuestions_mturk", "text": "A school joined in 1973."},
            {"source": "WikiTableQuestions_lily", "text": "Mars Hill College joined."},
        ],
    }
]
SAMSUM = [
    {"id": "13818513", "summary": "Amanda baked.", "dialogue": "Amanda: I baked.\r\nJerry: Sure!"}
]
DATASETS = {  # task, split -> the file, and the examples in it
    ("e2e", "train"): ("trainset.csv", E2E, None),
    ("e2e", "dev"): ("devset.csv", E2E, None),
    ("e2e", "test"): (
        "testset_w_refs.csv",
        E2E,
        [
            nlg.Example(EAGLE, ('The Eagle, a "cheap" shop.', "Cheap coffee: The Eagle.")),
            nlg.Example(
                "name : The Mill | near : Café Sicilia", ("The Mill is near Café Sicilia.",)
            ),
        ],
    ),
    ("webnlg", "train"): ("train/2triples/Airport.xml", WEBNLG_XML, WEBNLG),
    ("webnlg", "test"): ("test.json", json.dumps(WEBNLG_JSON), WEBNLG),
    ("dart", "dev"): (
        "dart-v1.1.1-full-dev.json",
        json.dumps(DART),
        [
            nlg.Example(
                "Mars Hill College : joined : 1973 | [TABLECONTEXT] : title : Teams",
                ("A school joined in 1973.", "Mars Hill College joined."),
            )
        ],
    ),
    ("samsum", "dev"): (
        "val.json",
        json.dumps(SAMSUM),
        [nlg.Example("Amanda: I baked.\nJerry: Sure!\n\n", ("Amanda baked.",))],
    ),
}


@pytest.mark.parametrize(("task", "split"), DATASETS)
def test_prompts_and_references(tmp_path, task, split):
    name, content, expected = DATASETS[task, split]
    write(tmp_path, {name: content, "unrelated.txt": ""})
    expected = DATASETS[task, "test"][2] if expected is None else expected
    assert nlg.read(tmp_path, task, split) == expected


@pytest.mark.parametrize(
    ("official", "others"),
    [
        (  # the release of 2017
            "testdata_with_lex.xml",
            ["testdata_unseen_with_lex.xml", "testdata_no_lex.xml"],
        ),
        (  # that of 2020
            "rdf-to-text-generation-test-data-with-refs-en.xml",
            [
                "rdf-to-text-generation-test-data-without-refs-en.xml",
                "semantic-parsing-test-data-with-refs-en.xml",
            ],
        ),
    ],
)
def test_webnlgs_test_set_among_others(tmp_path, official, others):
    foreign = WEBNLG_XML.replace("Ajoblanco", "Gazpacho")
    write(tmp_path, {f"test/{official}": WEBNLG_XML, **{f"test/{x}": foreign for x in others}})
    assert nlg.read(tmp_path, "webnlg", "test") == WEBNLG


def test_datasets_without_texts(tmp_path):
    write(tmp_path, {"test/a.xml": re.sub("<lex.*?</lex>", "", WEBNLG_XML, flags=re.DOTALL)})
    said = error(ValueError, nlg.read, tmp_path, "webnlg", "test")
    assert said == f"`{tmp_path}`: expected an example with a text in test of webnlg, got 0"


def test_references_become_pairs_again(tmp_path):
    write(tmp_path, {"trainset.csv": E2E})
    assert [answer for _, answer in nlg.pairs(nlg.read(tmp_path, "e2e", "train"))] == [
        'The Eagle, a "cheap" shop.',
        "Cheap coffee: The Eagle.",
        "The Mill is near Café Sicilia.",
    ]


def without(record, name):
    return {key: value for key, value in record.items() if key != name}


ENTRY = WEBNLG_JSON["entries"][0]["1"]
DAMAGED_DATASETS = [  # task, file, content, message after the name of the file
    ("e2e", "devset.csv", "mr,refs\n", ", line 1: expected the header mr,ref, got mr,refs"),
    ("e2e", "devset.csv", "", ", line 1: expected the header mr,ref, got "),
    (
        "e2e",
        "devset.csv",
        "mr,ref\nname[a],b,c\n",
        ", line 2: expected 2 fields, got ['name[a]', 'b'",
    ),
    (
        "e2e",
        "devset.csv",
        "mr,ref\nname[a,b\n",
        ", line 2: expected mr as name[…], eatType[…], got",
    ),
    ("e2e", "devset.csv", 'mr,ref\nname[a],"b\n', ", line 2: expected CSV, got unexpected end of"),
    ("webnlg", "dev/a.xml", "<benchmark>", ", line 1: expected XML, got no element found"),
    (
        "webnlg",
        "dev/a.xml",
        "<benchmark><entry/></benchmark>",
        ": expected <entry> in <entries>, got ['entry']",
    ),
    ("webnlg", "dev/a.xml", "<html/>", ": expected <benchmark>, got <html>"),
    (
        "webnlg",
        "dev/a.xml",
        WEBNLG_XML.replace("Ajoblanco | region", "Ajoblanco"),
        ", entry Id2: expected <mtriple>subject | property | object</mtriple>, got "
        "['Ajoblanco | Andalusia']",
    ),
    (
        "webnlg",
        "dev.json",
        json.dumps({"entries": [{"1": without(ENTRY, "lexicalisations")}]}),
        ', entry 1: expected an object with a field "lexicalisations", got fields [',
    ),
    ("webnlg", "dev.json", '{"entries": [1]}', ": expected entries of one number each, got 1"),
    ("dart", "dart-v1-full-dev.json", "{}", ": expected a list, got dict"),
    (
        "dart",
        "dart-v1-full-dev.json",
        json.dumps([{**DART[0], "tripleset": [["a", "b"]]}]),
        ", item 1: expected three texts a triple, got ['a', 'b']",
    ),
    (
        "samsum",
        "val.json",
        b'["\xe7"]',
        ": expected UTF-8, got 'utf-8' codec can't decode byte 0xe7",
    ),
    ("samsum", "val.json", "[\n{]", ", line 2: expected JSON, got Expecting property name"),
    (
        "samsum",
        "val.json",
        json.dumps([SAMSUM[0], without(SAMSUM[0], "summary")]),
        ", item 2: expected an object with a field \"summary\", got fields ['dialogue', 'id']",
    ),
]


@pytest.mark.parametrize(("task", "name", "content", "message"), DAMAGED_DATASETS)
def test_damaged_datasets(tmp_path, task, name, content, message):
    write(tmp_path, {name: content})
    said = error(FormatError, nlg.read, tmp_path, task, "dev")
    assert said.startswith(f"`{tmp_path / name}`{message}")


MISSING = {
    "e2e": "testset_w_refs.csv. Put the testset_w_refs.csv of the E2E data set there.",
    "webnlg": "test.json. Put test.json of WebNLG 2017, or the folder test of a release in XML, "
    "there.",
    "dart": "dart-*-full-test.json. Put dart-v1.1.1-full-test.json of DART there.",
    "samsum": "test.json. Put test.json of the SAMSum corpus there.",
}


@pytest.mark.parametrize("task", nlg.READERS)
def test_missing_datasets(tmp_path, task):
    said = error(FileNotFoundError, nlg.read, tmp_path, task, "test")
    assert said == f"`{tmp_path}` holds nothing: expected {MISSING[task]}"


# ---- WikiSQL ------------------------------------------------------------------------------------

TABLE = {
    "id": "1-1000181-1",
    "header": ["State/territory", 'Text/"background"', "No. AND", "No. AND"],
    "types": ["text", "text", "real", "real"],
    "rows": [["ACT", "blue/white", 5, 6]],
    "name": "table_1000181_1",
}
QUESTIONS = [
    {
        "phase": 1,
        "table_id": "1-1000181-1",
        "question": "How many are there?",
        "sql": {"sel": 1, "conds": [[0, 0, "O'Hara' AND \"x\" = 'y"], [2, 1, 4.5]], "agg": 3},
    },
    {
        "phase": 1,
        "table_id": "1-1000181-1",
        "question": "Which?",
        "sql": {"sel": 3, "conds": [], "agg": 0},
    },
]


def wikisql_files(questions):
    return {"dev.jsonl": jsonl(*questions), "dev.tables.jsonl": jsonl(TABLE)}


@pytest.fixture
def questions(tmp_path):
    return wikisql.read(write(tmp_path, wikisql_files(QUESTIONS)), "dev")


def test_wikisql(questions):
    header = tuple(TABLE["header"])
    query = wikisql.Query(1, 3, ((0, 0, "O'Hara' AND \"x\" = 'y"), (2, 1, "4.5")))
    answer = (
        'SELECT COUNT("Text/""background""") FROM table WHERE "State/territory" = '
        "'O''Hara'' AND \"x\" = ''y' AND \"No. AND\" > '4.5'"
    )
    prompt = 'State/territory | Text/"background" | No. AND | No. AND\nHow many are there?\n\n'
    assert questions[0] == wikisql.Example(prompt, answer, query, header)
    assert wikisql.parse(answer, header) == query


def test_queries_survive_as_text():
    rng = np.random.default_rng(0)
    header = ["a", 'b "c"', "d's", "WHERE", ") FROM table", ""]
    values = ["1", "x'y", '"', "' AND \"a\" = '", "", "İß"]
    for _ in range(200):
        conditions = tuple(
            (int(rng.integers(6)), int(rng.integers(3)), str(rng.choice(values)))
            for _ in range(rng.integers(4))
        )
        query = wikisql.Query(int(rng.integers(6)), int(rng.integers(6)), conditions)
        assert wikisql.parse(wikisql.render(query, header), header) == query


def test_logical_form_accuracy(questions):
    first, second = (example.answer for example in questions)
    other_order = (
        'SELECT COUNT("Text/""background""") FROM table WHERE "No. AND" > \'4.5\' AND '
        "\"State/territory\" = 'o''hara'' and \"x\" = ''y'"
    )
    assert wikisql.accuracy([first, second], questions) == 1  # the second by its column's name
    assert wikisql.accuracy([other_order, f" {second}\n"], questions) == 1
    wrong = [
        first.replace("COUNT", "SUM"),
        first.replace("> '4", "< '4"),
        first.replace("4.5", "4.6"),
        first.replace("No. AND", "No."),
        first.replace(" AND \"No. AND\" > '4.5'", ""),
        f"{first} AND",
        "",
    ]
    for text in wrong:
        assert text != first
        assert wikisql.accuracy([text, second], questions) == 0.5
    assert error(ValueError, wikisql.accuracy, [first], questions) == (
        "`texts`: expected 2, at least 1, got 1"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table_id": "2"}, "the id of a table in the .tables.jsonl beside it, got 2"),
        ({"sql": {"sel": 4, "agg": 0, "conds": []}}, "sel below 4, got 4"),
        ({"sql": {"sel": 0, "agg": 6, "conds": []}}, "agg below 6, got 6"),
        ({"sql": {"sel": 0, "agg": 0, "conds": [[0, 3, ""]]}}, "an operator below 3, got 3"),
        ({"sql": {"sel": 0, "agg": 0, "conds": [[-1, 0, ""]]}}, "a column below 4, got -1"),
        (
            {"sql": {"sel": 0, "agg": 0, "conds": [[0, 0]]}},
            "conditions of a column, an operator and a value, got [[0, 0]]",
        ),
    ],
)
def test_damaged_wikisql(tmp_path, change, message):
    write(tmp_path, wikisql_files([QUESTIONS[0], {**QUESTIONS[1], **change}]))
    said = error(FormatError, wikisql.read, tmp_path, "dev")
    assert said == f"`{tmp_path}/dev.jsonl`, line 2: expected {message}"


def test_missing_wikisql(tmp_path):
    write(tmp_path, {"dev.jsonl": jsonl(*QUESTIONS)})
    assert error(FileNotFoundError, wikisql.read, tmp_path, "dev") == (
        f"`{tmp_path}` holds ['dev.jsonl']: expected dev.tables.jsonl. "
        "Put the files of WikiSQL's data.tar.bz2 there."
    )


# ---- metrics ------------------------------------------------------------------------------------


def test_scores_of_classes():
    labels = np.array([1, 1, 1, 0, 0, 1, 0, 1])
    predictions = np.array([1, 0, 1, 0, 1, 1, 0, 1])  # 4 true positives, 2 negatives, 1 and 1 false
    matthews = (4 * 2 - 1 * 1) / math.sqrt(5 * 5 * 3 * 3)
    for task in ("mrpc", "qqp"):
        scores = metrics.glue(task, predictions, labels)
        assert scores == pytest.approx({"accuracy": 6 / 8, "f1": 2 * 4 / (2 * 4 + 1 + 1)})
        assert next(iter(scores)) == "accuracy"
    scores = metrics.glue("cola", predictions, labels)
    assert scores == pytest.approx({"matthews": matthews, "accuracy": 6 / 8})
    assert next(iter(scores)) == "matthews"
    for task in ("sst2", "mnli", "qnli", "rte", "wnli"):
        assert metrics.glue(task, predictions, labels) == {"accuracy": 6 / 8}
    assert metrics.glue("mnli", [0, 1, 2], [0, 2, 2]) == {"accuracy": pytest.approx(2 / 3)}


def test_constant_predictions_score_zero():
    labels, ones = [1, 0, 1, 0], [0, 0, 0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.glue("cola", ones, labels) == {"matthews": 0, "accuracy": 0.5}
        assert metrics.glue("mrpc", ones, labels) == {"accuracy": 0.5, "f1": 0}


def test_correlations():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 50))
    scores = metrics.glue("stsb", x, x + y)
    assert scores["pearson"] == pytest.approx(np.corrcoef(x, x + y)[0, 1])
    ranks = [np.argsort(np.argsort(v)) for v in (x, x + y)]
    assert scores["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert metrics.glue("stsb", [1, 2, 4], [2, 3, 5])["pearson"] == pytest.approx(1)


def test_glue_scores_of_other_lengths():
    assert error(ValueError, metrics.glue, "rte", [1, 0], [1]) == (
        "`predictions` and `labels`: expected equal shapes (n,), n > 0, got (2,) and (1,)"
    )


# The example of sacrebleu's documentation: two references for two sentences, one for the third.
SACREBLEU = (
    ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."],
    [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ],
)


def test_bleu_and_ter():
    texts, references = SACREBLEU
    assert metrics.bleu(texts, references) == pytest.approx(48.530827, abs=1e-6)
    fewer = [references[0][:1], *references[1:]]
    assert 0 < metrics.bleu(texts, fewer) <= metrics.bleu(texts, references)
    upper = [text.upper() for text in texts]
    assert metrics.bleu(upper, references, lowercase=True) > metrics.bleu(upper, references)
    # One of four words must be inserted.
    assert metrics.ter(["the cat sat"], [["the cat sat down"]]) == pytest.approx(25)
    assert metrics.ter(["the cat sat"], [["a b", "the cat sat"]]) == 0


def test_rouge():
    # Unigrams 5 of 6 and 6; bigrams 3 of 5 and 5; the longest common subsequence 5.
    texts, references = ["the cat sat on the mat"], [["dog", "the cat lay on the mat"]]
    expected = {"rouge1": 100 * 5 / 6, "rouge2": 100 * 3 / 5, "rougeL": 100 * 5 / 6}
    assert metrics.rouge(texts, references) == pytest.approx(expected)
    half = metrics.rouge([*texts, "cats sit"], [*references, ["cat sit"]])  # stems agree
    assert half["rouge1"] == pytest.approx(100 * (5 / 6 + 1) / 2)
    # Precision 1, recall 1/2 of the first reference, less of the second.
    score = metrics.rouge_l(["a b"], [["a b c d", "x a y"]])
    assert score == pytest.approx(100 * 2.44 * 1.0 * 0.5 / (0.5 + 1.44 * 1.0))
    # Precision 1 of the first reference, recall 1 of the second.
    score = metrics.rouge_l(["a b"], [["a b c", "b"]])
    assert score == pytest.approx(100)
    assert metrics.rouge_l(["a b"], [["c"]]) == 0


def random_corpus(rng, references):
    def text():
        return rng.choice(list("abcdefgh"), rng.integers(5, 15)).tolist()

    return [text() for _ in range(8)], [[text() for _ in range(references)] for _ in range(8)]


def test_nist_with_one_reference_is_nltks():
    texts, references = random_corpus(np.random.default_rng(0), 1)
    assert ngrams.nist(texts, references) == pytest.approx(corpus_nist(references, texts))
    assert ngrams.nist(texts, references) > 0.5


def test_nist_by_hand():
    # In both references together: 8 tokens, a 2, b 2, c 4, a b 2, b c 2.
    references = [[["a", "b", "c", "c"], ["a", "b", "c", "c"]]]
    one = math.log2(8 / 2) * 2 + math.log2(8 / 4)  # a, b, c
    two = math.log2(2 / 2) + math.log2(2 / 2)  # b after a, c after b
    score = ngrams.nist([["a", "b", "c"]], references)
    penalty = 0.5 ** ((math.log(3 / 4) / math.log(3 / 2)) ** 2)
    assert score == pytest.approx((one / 3 + two / 2) * penalty)
    assert ngrams.nist([[]], references) == 0


def test_cider():
    texts, references = random_corpus(np.random.default_rng(1), 3)
    own = [several[0] for several in references]
    single = [[several[0]] for several in references]
    assert ngrams.cider(own, single) == pytest.approx(10)
    assert ngrams.cider([["z"]] * 8, references) == 0
    assert 0 < ngrams.cider(texts, references) < ngrams.cider(own, references) < 10


def test_cider_by_hand():
    references = [[["a", "b"]], [["c", "d"], ["c", "e"]]]
    # Each of a, b, ab, c is in the references of one of two texts: idf log 2; so are d and e.
    # ("a",) against (a, b): half of n = 1 up to the root; none of the bigrams; a gap of 1 bigram.
    expected = 10 * (1 / math.sqrt(2)) * math.exp(-1 / 72) / 4 / 2
    assert ngrams.cider([["a"], ["z"]], references) == pytest.approx(expected)
    # Repeating a word does not pay: clipped to the reference's count, but in the norm.
    expected = 10 * (1 / (2 * math.sqrt(2))) / 4 / 2
    assert ngrams.cider([["a", "a"], ["z"]], references) == pytest.approx(expected)


def test_generation_scores():
    texts, references = SACREBLEU
    scores = metrics.generation(texts, references)
    assert list(scores) == ["bleu_lower", "bleu", "nist", "rouge_l", "cider", "ter"]
    # What coco-caption (pycocoevalcap 1.2) computes from the same tokens.
    assert scores["cider"] == pytest.approx(3.493110954239988, rel=1e-12)
    assert scores["rouge_l"] == pytest.approx(72.22222222222221, rel=1e-12)
    perfect = metrics.generation(texts, [[text] for text in texts])
    assert (perfect["bleu"], perfect["rouge_l"]) == pytest.approx((100, 100))
    assert perfect["cider"] > scores["cider"] > 0
    assert perfect["nist"] > scores["nist"] > 0
    assert scores["ter"] > perfect["ter"] == 0


@pytest.mark.parametrize(
    "metric",
    [metrics.bleu, metrics.ter, metrics.rouge, metrics.rouge_l, metrics.nist, metrics.cider],
)
def test_references_of_every_text(metric):
    assert error(ValueError, metric, ["a", "b"], [["a"]]) == (
        "`references`: expected a list for each of 2 texts, at least 1, got 1"
    )
    assert error(ValueError, metric, ["a", "b"], [["a"], "b"]) == (
        "`references[1]`: expected a list of texts, got 'b'"
    )
    assert error(ValueError, metric, ["a"], [[]]) == (
        "`references[0]`: expected a list of texts, got []"
    )


# ---- recipes ------------------------------------------------------------------------------------


def test_recipes_of_the_paper():
    paper = {  # of RoBERTa: batch, epochs, learning rate
        "mnli": (16, 30, 5e-4, 10, 3e-4),
        "sst2": (16, 60, 5e-4, 10, 4e-4),
        "mrpc": (16, 30, 4e-4, 20, 3e-4),
        "cola": (32, 80, 4e-4, 20, 2e-4),
        "qnli": (32, 25, 4e-4, 10, 2e-4),
        "qqp": (16, 25, 5e-4, 20, 3e-4),
        "rte": (32, 80, 5e-4, 20, 4e-4),
        "stsb": (16, 40, 4e-4, 10, 2e-4),
    }
    for task, row in paper.items():
        base, large = (table.recipe(f"roberta-{size}", task) for size in ("base", "large"))
        assert (base.batch, base.epochs, base.learning_rate) == row[:3]
        assert (large.epochs, large.learning_rate) == row[3:]
        assert (base.rank, base.alpha, base.length, base.warmup_ratio) == (8, 8, 512, 0.06)
        assert (large.rank, large.alpha, large.warmup_ratio) == (8, 16, 0.06)
        start = "mnli" if task in ("mrpc", "rte", "stsb") else None
        assert base.start == large.start == start
        assert table.recipe("deberta-v2-xxlarge", task).rank == 16
    for model in ("gpt2-medium", "gpt2-large"):
        e2e = table.recipe(model, "e2e")
        assert (e2e.learning_rate, e2e.batch, e2e.epochs, e2e.rank, e2e.alpha) == (
            2e-4,
            8,
            5,
            4,
            32,
        )
        assert (e2e.weight_decay, e2e.dropout, e2e.label_smoothing) == (0.01, 0.1, 0.1)
        assert e2e.warmup(42061) == 500
    assert table.DECODING["e2e"] == table.Decoding(10, 0.9, 4, 64)
    lengths = {
        task: table.recipe("gpt3-175b", task).length for task in ("wikisql", "mnli", "samsum")
    }
    assert lengths == {"wikisql": 384, "mnli": 768, "samsum": 2048}
    assert len(table.RECIPES) == 3 * 8 + 2 * 3 + 3 + 1  # MiniLM's is ours
    assert {task for _, task in table.RECIPES} <= {*glue.TASKS, *nlg.READERS, "wikisql"}


def test_steps_and_warmup():
    recipe = table.recipe("roberta-base", "rte")
    assert recipe.steps(2490) == 80 * 78
    assert recipe.warmup(2490) == math.ceil(0.06 * 80 * 78)
    recipe = table.recipe("gpt3-175b", "wikisql")
    assert recipe.warmup(56355) == math.ceil(250_000 / (128 * 384))
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.batch = 1


def test_unknown_recipes():
    models = "roberta-base, roberta-large, deberta-v2-xxlarge, gpt2-medium, gpt2-large, gpt3-175b, "
    models += "minilm"
    assert error(ValueError, table.recipe, "bert", "rte") == (
        f"`model` must be one of {models}, got 'bert'"
    )
    assert error(ValueError, table.recipe, "gpt2-large", "rte") == (
        "`task` of gpt2-large must be one of e2e, webnlg, dart, got 'rte'"
    )


# ---- tokens -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return encoding.load_tokenizer(data.minilm())


def test_pairs_are_cut_from_the_longer_text(tokenizer):
    texts = [("a b c d e f g h", "x y"), ("one text only",), ("a", "b")]
    rows = encoding.classification(texts, [1, None, 0], tokenizer, 8)
    tokens = [" ".join(map(tokenizer.id_to_token, row["ids"])) for row in rows]
    assert tokens == [
        "[CLS] a b c [SEP] x y [SEP]",
        "[CLS] one text only [SEP]",
        "[CLS] a [SEP] b [SEP]",
    ]
    assert rows[0]["types"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert [row["label"].item() for row in rows] == [1, -1, 0]
    assert {row[name].dtype for row in rows for name in row} == {np.dtype(np.int32)}
    again = encoding.classification(texts, [1, None, 0], tokenizer, 64)
    assert len(again[0]["ids"]) == 13  # the tokenizer was not changed


def test_scores_are_floats(tokenizer):
    rows = encoding.classification([("a", "b")] * 2, [4.75, None], tokenizer, 8)
    assert [(row["label"].item(), row["label"].dtype) for row in rows] == [
        (4.75, np.float32),
        (-1.0, np.float32),
    ]


def test_prompts_and_answers(tokenizer):
    start, stop = 101, 102
    (row,) = encoding.generation([("a b", "c")], tokenizer, 8, stop, start)
    a, b, c = map(tokenizer.token_to_id, "abc")
    assert row["ids"].tolist() == [a, b, start, c, stop]
    assert row["counts"].tolist() == [0, 0, 0, 1, 1]
    (row,) = encoding.generation([("a b", "c")], tokenizer, 4, stop, start)
    assert row["ids"].tolist() == [b, start, c, stop]
    (row,) = encoding.generation([("a b", "c")], tokenizer, 3, stop, start)
    assert row["ids"].tolist() == [start, c, stop]
    assert encoding.generation([], tokenizer, 3, stop, start) == []
    said = error(ValueError, encoding.generation, [("a", "b c")], tokenizer, 3, stop, start)
    assert said == "`length` = 3: answer 0 has 2 tokens and needs 4: 'b c'"


def test_missing_tokenizer(tmp_path):
    said = error(FileNotFoundError, encoding.load_tokenizer, tmp_path)
    assert said.startswith(f"`{tmp_path}/tokenizer.json` is missing. Put the checkpoint's there; ")


# ---- batches ------------------------------------------------------------------------------------


def rows_of(*lengths):
    return [
        {"ids": np.arange(1, n + 1, dtype=np.int32), "label": np.array(i, np.float32)}
        for i, n in enumerate(lengths)
    ]


def labels_of(several):
    return [int(x) for b in several for x in b["label"][b["weight"] > 0]]


def test_every_epoch_has_every_row_once_in_another_order():
    made = batches.batches(rows_of(*[3] * 10), 4, [4], seed=0, epochs=3)
    epochs = [labels_of(made[i] for i in range(start, start + 3)) for start in (0, 3, 6)]
    assert len(made) == 9
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_batches_follow_from_seed_and_step():
    made = batches.batches(rows_of(*range(1, 11)), 4, [4, 16], seed=0, epochs=3)
    again = batches.batches(rows_of(*range(1, 11)), 4, [4, 16], seed=0, epochs=5)
    other = batches.batches(rows_of(*range(1, 11)), 4, [4, 16], seed=1, epochs=3)
    for step in reversed(range(9)):
        jax.tree.map(np.testing.assert_array_equal, made[step], again[step])
    assert labels_of(made) != labels_of(other)
    assert labels_of(list(made)[4:]) == labels_of(made[i] for i in range(4, 9))


def test_without_a_seed_rows_keep_their_order():
    made = batches.batches(rows_of(1, 2, 3, 4, 5), 2, [8])
    assert labels_of(made) == [0, 1, 2, 3, 4]


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


def test_few_shapes():
    rows = rows_of(*np.random.default_rng(0).integers(1, 60, 100))
    made = batches.batches(rows, 3, [16, 32, 64], seed=0, epochs=2)
    assert {b["ids"].shape for b in made} == {(3, 16), (3, 32), (3, 64)}


def test_rows_that_cannot_be_batched():
    assert error(ValueError, batches.batches, [], 2, [4]) == "`rows` is empty"
    assert error(ValueError, batches.batches, rows_of(5), 2, [2, 4]) == (
        "`lengths`: a row has 5 tokens, the last length is 4"
    )


def test_from_a_file_to_the_score(tmp_path, tokenizer):
    """Sentences as SST-2's file, through two layers of MiniLM with a head that prefers no class."""
    snippets = data.movie_snippets()[1][:40]
    lines = [f"{snippet.text}|{snippet.label}" for snippet in snippets]
    write(tmp_path, {"SST-2/dev.tsv": tsv("sentence label", *lines)})
    texts, labels = zip(*glue.read(tmp_path, "sst2", "dev"), strict=True)
    assert texts == tuple((snippet.text,) for snippet in snippets)
    (tmp_path / "minilm").mkdir()
    with two_layers.minilm(tmp_path / "minilm", 2):
        config, variables = bert.load(data.minilm())
    variables = bert.add_head(variables, 2)
    apply = jax.jit(bert.Bert(config, classes=2).apply)
    predictions = []
    for batch in batches.batches(encoding.classification(texts, labels, tokenizer, 32), 16, [32]):
        logits = apply(variables, batch["ids"], batch["mask"], batch["types"])
        predictions += np.argmax(logits, -1)[batch["weight"] > 0].tolist()
    zeros = sum(not snippet.label for snippet in snippets)
    assert metrics.glue("sst2", predictions, labels) == {"accuracy": zeros / 40}


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


@pytest.mark.parametrize(
    "penalty", [0.0, 0.9, *(pytest.param(x, marks=pytest.mark.slow) for x in (2.0, -1.0))]
)
@pytest.mark.parametrize(("no_repeat", "prompt_counts"), [(0, True), (2, True), (2, False)])
@pytest.mark.parametrize("stop", [(STOP,), (STOP, 2), ()])
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


def test_score_is_the_sum_over_the_length_to_the_penalty():
    step = table_step(0)
    for text in beam.search(step, [(1,)], beams=3, new_tokens=5, stop=(STOP,), penalty=0.7)[0]:
        total, ids = 0.0, [1]
        for token in text.ids:
            total += beam.log_softmax(step(np.array([ids]), np.array([len(ids)]))[0])[0, token]
            ids.append(token)
        assert text.score == pytest.approx(total / len(text.ids) ** 0.7)


@pytest.mark.parametrize("seed", [0, 2, 5, 7])
def test_one_beam_without_penalty_is_greedy(seed):
    step = table_step(seed)
    ids = [2]
    while len(ids) < 9 and ids[-1] != STOP:
        ids.append(int(step(np.array([ids]), np.array([len(ids)]))[0].argmax()))
    ((text,),) = beam.search(step, [(2,)], beams=1, new_tokens=8, stop=(STOP,), penalty=0.0)
    assert text.ids == tuple(ids[1:])


def test_prompts_do_not_see_each_other():
    prompts = [(1, 2), (0,), (2, 2, 1)]
    rules = {"beams": 3, "new_tokens": 5, "stop": (STOP,), "penalty": 0.8, "no_repeat": 3}
    step = table_step(2)
    together = beam.search(step, prompts, **rules)
    assert together == [beam.search(step, [prompt], **rules)[0] for prompt in prompts]
    assert together == beam.search(step, prompts, length=20, **rules)


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


def test_nothing_left_to_say():
    """Every token is banned once each has come: n-grams of one."""
    step = table_step(0)
    (texts,) = beam.search(step, [(3,)], beams=2, new_tokens=9, stop=(), no_repeat=1)
    assert texts == []
    (texts,) = beam.search(step, [(3,)], beams=2, new_tokens=3, stop=(), no_repeat=1)
    assert [sorted(text.ids) for text in texts] == [[0, 1, 2]] * 2


def test_impossible_searches():
    search = functools.partial(beam.search, table_step(0), beams=2, new_tokens=4, stop=())
    assert error(ValueError, search, [[1], []]) == (
        "`prompts`: expected at least one, of at least one token each"
    )
    said = error(ValueError, search, [[1, 2]], length=5)
    assert said == "`length`: expected at least 6, got 5"


def test_logits_that_are_no_numbers():
    def step(ids, lengths, parents, state):
        return np.full((len(ids), VOCAB), np.nan), state

    rules = {"beams": 2, "new_tokens": 4, "stop": ()}
    said = error(FloatingPointError, beam.search, step, [[1, 2]], **rules)
    assert said == "`step` gave NaN for texts of [2, 2] tokens"


def test_search_over_a_model():
    config = gpt.Config(vocab=50, positions=16, layers=1, dim=16, heads=2)
    model = gpt.GPT(config)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    variables = jax.tree.map(lambda x: 3 * x, variables)
    logits_fn = jax.tree_util.Partial(model.apply, variables)
    rules = {"beams": 3, "new_tokens": 6, "stop": (7,), "penalty": 0.9, "no_repeat": 2}
    prompts = [(1, 2, 3), (4,)]
    apply = jax.jit(model.apply)
    found = beam.search(beam.uncached(logits_fn), prompts, **rules)
    again = beam.search(beam.cached(logits_fn, config.cache), prompts, **rules)
    for texts, others in zip(found, again, strict=True):
        assert [text.ids for text in texts] == [text.ids for text in others]
        expected = [text.score for text in texts]
        assert [text.score for text in others] == pytest.approx(expected, abs=1e-5)
    for prompt, texts in zip(prompts, found, strict=True):
        assert len(texts) == 3
        for text in texts:
            ids = np.array([[*prompt, *text.ids]])
            filled = np.pad(ids, ((0, 0), (0, config.positions - ids.size)))  # of one length
            scores = jax.nn.log_softmax(apply(variables, filled)[0])
            total = sum(scores[len(prompt) - 1 + i, token] for i, token in enumerate(text.ids))
            assert text.score == pytest.approx(float(total) / len(text.ids) ** 0.9, abs=1e-4)
            assert not has_repeats(ids[0].tolist(), 2)
