"""All of `peft_families` in the long run; else every family twice, and every configuration."""

import pathlib

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft_families as families
from small import every

# What PyTorch and its libraries warn of is theirs; what names nothing is warned of by ours.
pytestmark = pytest.mark.filterwarnings("default")

# Why an adapter cannot be merged exactly: the guide lists them.
REFUSED = (
    "layer_replication",
    "the model may read this weight twice, as its input embedding and as its output head",
    "It may share the weight of the input embedding",
    "but their values differ. Correct tie_word_embeddings there.",
    "has rows in the adapter, which PEFT also gives",
)
NAMES = list(families.CONFIGURATIONS)
SLICE = [
    (family, NAMES[(7 * i + step) % len(NAMES)])
    for i, family in enumerate(families.FAMILIES)
    for step in (0, 3)
]
# A model that partly has the names of the checkpoint, and two that have none of them.
ONCE = {
    "VisionEncoderDecoderModel": "bias-of-b",
    "NemotronHForCausalLM": "experts",
    "AltCLIPModel": "all-linear",
}
SLICE += [x for x in ONCE.items() if x[0] in families.FAMILIES and x not in SLICE]


@pytest.mark.parametrize(("family", "configuration"), every(families.FAMILIES, NAMES, daily=SLICE))
def test_as_peft_merges_it(family: str, configuration: str, tmp_path: pathlib.Path) -> None:
    found = families.outcome(family, configuration, tmp_path)
    assert found.kind in ("bits", "rounding", "once", "untied", "refused", "not by PEFT")
    if found.kind == "refused":
        assert any(reason in found.reason for reason in REFUSED), found


def test_the_readme_says_how_many() -> None:
    text = (pathlib.Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    text = " ".join(text.split())
    assert f"{len(NAMES)} configurations of PEFT" in text and "into more than 50 models" in text
    assert len(families.FAMILIES) > 50
