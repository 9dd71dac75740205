"""Examples with a server: `chat.py --vllm` asks it, `serve_rl.py` trains with it. Needs vLLM."""

import importlib.util
import pathlib
import sys

import pytest

if not importlib.util.find_spec("vllm"):
    pytest.skip("needs vLLM", allow_module_level=True)

import chat
import serve_rl
import served
from models import llama

from tests.examples.folders import write_chat_model, write_conversations

SMALL = llama.Config(vocab=400, layers=2, dim=128, hidden=48, heads=4, kv_heads=2)


@pytest.mark.filterwarnings("default")
def test_the_server_answers_as_jax(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a client of OpenAI's protocol, with the adapter that the run wrote."""
    write_chat_model(tmp_path / "out" / "smollm2", SMALL)  # the model without --base
    monkeypatch.chdir(tmp_path)
    data = write_conversations(tmp_path / "data.jsonl", 3)
    sizes = "--length 160 --batch 2 --rank 4 --steps 6 --learning-rate 0.02 --held-out 8"
    places = [
        f"--data={data}",
        f"--out={tmp_path / 'run'}",
        f"--vllm={sys.executable}",
    ]
    result = chat.main([*places, *sizes.split()])
    assert len(result.answers) == chat.SHOWN
    # vLLM keeps back the bytes of half a letter.
    assert result.served == [text.rstrip("\N{REPLACEMENT CHARACTER}") for text in result.answers]


def test_an_adapter_that_vllm_refuses(tmp_path: pathlib.Path) -> None:
    """No server starts."""
    folder = pathlib.Path(__file__).parents[1] / "fixtures" / "peft" / "dora"
    base = write_chat_model(tmp_path / "base", SMALL)
    with (
        pytest.raises(ValueError, match="refused: use_dora"),
        served.serve(sys.executable, base, folder),
    ):
        raise AssertionError


@pytest.mark.filterwarnings("default")
def test_samples_follow_the_adapter(tmp_path: pathlib.Path) -> None:
    """The server samples with the adapter of each step, not with the one before."""
    base = write_chat_model(tmp_path / "base", SMALL)
    places = [f"--base={base}", f"--out={tmp_path / 'out'}", f"--vllm={sys.executable}"]
    sizes = "--steps 3 --batch 4 --tokens 6 --rate 0.02"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "of_the_user").touch()
    found = serve_rl.main([*places, *sizes.split()])
    assert (tmp_path / "out" / "of_the_user").exists()
    assert max(found.differences) < 1e-4
    assert min(found.stale[1:]) > 1e-2
