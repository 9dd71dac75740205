"""The guide of many hosts: its program in two processes, killed and started again."""

import os
import pathlib
import re
import subprocess

import processes
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("jlora.torch._apply")
transformers = pytest.importorskip("transformers")

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "notebooks/loops/cluster.md"
JOIN = "import jax\njax.distributed.initialize('{}', 2, {})\n"
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def start(folder: pathlib.Path, out: str) -> list[subprocess.Popen[str]]:
    """Two processes that train on a base, in a folder."""
    code = "".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S))
    where = f"localhost:{processes.free_port()}"
    own = {"BASE": str(folder / "base"), "OUT": str(folder / out), "JAX_PLATFORMS": "cpu"}
    own |= {"ADAPTER": str(folder / f"{out}-adapter")}
    own |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/examples", "PYTHONUNBUFFERED": "1"}
    codes = [JOIN.format(where, i) + code for i in range(2)]
    return [processes.start("-c", code, env=own, stderr=None) for code in codes]


def losses(started: list[subprocess.Popen[str]], stop: int | None = None) -> dict[int, float]:
    """Steps and losses, as process 0 prints them; at step `stop` both are killed."""
    found = {}
    for line in started[0].stdout or ():
        if match := re.fullmatch(r"(\d+) (\d+\.\d+)\n", line):
            found[int(match[1])] = float(match[2])
        if stop in found:
            break
    for process in started:
        if stop is not None:
            process.kill()
        process.communicate()
        assert stop is not None or process.returncode == 0
    return found


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: pathlib.Path) -> None:
    """To the losses and the file of a run that was not stopped, bit for bit."""
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=4, initializer_range=0.2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    whole = losses(start(tmp_path, "whole"))
    assert list(whole) == [10, 20, 30, 40] and whole[40] < 0.8 * whole[10]
    losses(start(tmp_path, "out"), stop=20)  # the checkpoint of step 10 is written
    again = losses(start(tmp_path, "out"))
    assert again and again.items() <= whole.items() and 10 not in again and 40 in again
    files = [tmp_path / f"{out}-adapter/adapter_model.safetensors" for out in ("whole", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()
