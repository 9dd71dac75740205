"""`examples/grpo.py` on a small model; SmolLM2-135M itself is slow."""

import grpo
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from cases._case import fill
from models import llama, parts
from small import raw

CONFIG = llama.Config(16, 2, 16, 32, 2, 1)
PARAMS = fill(parts.shapes(llama.Llama(CONFIG)), jnp.float32, 0.3)


class Tokenizer:
    """A token for each letter of prompts and numbers."""

    letters = "0123456789+=\n?!."

    def __call__(self, texts):
        """The ids of texts."""
        return {"input_ids": [[self.letters.index(x) for x in text] for text in texts]}

    def decode(self, ids):
        """A text."""
        return "".join(self.letters[i] for i in ids)

    def batch_decode(self, rows):
        """Texts."""
        return [self.decode(row) for row in rows]


def once(make):
    """What the first call of `make` gives, in every call: a program is compiled once."""
    made = []
    return lambda *args: made[0] if made else made.append(make(*args)) or made[0]


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Runs the example on the small model, which is rewarded for sevens: last state, and OUT."""
    monkeypatch.setattr(grpo, "HELD_OUT", grpo.HELD_OUT[:8])
    monkeypatch.setattr(grpo, "reward", lambda _, answer: float("7" in answer))
    monkeypatch.setattr(grpo, "make_programs", once(grpo.make_programs))
    small = ["--groups=2", "--size=4", "--rate=0.01", "--save-every=2", "--rank=2"]

    def run(name, *options):
        out = tmp_path / name
        return grpo.main([*small, f"--out={out}", *options], (CONFIG, PARAMS, Tokenizer())), out

    return run


def test_rewards_and_advantages():
    """The number counts, not what follows; a group whose answers are alike says nothing."""
    answers = ("19\n6", "19", "190", "1", "019")
    assert [grpo.reward((14, 5), x) for x in answers] == [1, 1, 0, 0, 0]
    found = grpo.advantages(np.array([[0.0, 1.0], [1.0, 1.0]]))
    np.testing.assert_allclose(found, [[-1, 1], [0, 0]], atol=1e-3)


SLOW = pytest.param(("--full",), id="full", marks=pytest.mark.slow)


@pytest.mark.parametrize("options", [pytest.param((), id="LoRA"), SLOW])
def test_a_stopped_run_goes_on(options, go, monkeypatch):
    """To the last bit; only when asked to, and only as it began."""
    whole, out = go("whole", "--steps=5", *options)
    stopped, save = ("stopped", "--steps=5", *options), grpo.save

    def stop(manager, step, *args, **more):
        save(manager, step, *args, **more)
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(grpo, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        go(*stopped)
    monkeypatch.setattr(grpo, "save", save)
    with pytest.raises(SystemExit):
        go(*stopped)
    with pytest.raises(ValueError, match=r"cannot resume from .*: seed was 0, is 1"):
        go(*stopped, "--resume", "--seed=1")
    rest, other = go(*stopped, "--resume")
    assert raw(rest) == raw(whole)
    first, second = (
        [row | {"tokens_per_second": 0} for row in tables.read(folder / "steps.csv")]
        for folder in (out, other)
    )
    assert first == second and [row["step"] for row in first] == [1, 2, 3, 4, 5]
    assert first[0]["kl"] == 0 < first[4]["kl"]  # the reference is the base, and B is 0
    assert (out / "result.csv").read_bytes() == (other / "result.csv").read_bytes()


@pytest.mark.slow
def test_smollm2_learns(tmp_path, monkeypatch):
    """Some sums are right at the start, and many more after some steps."""
    monkeypatch.setattr(grpo, "HELD_OUT", grpo.HELD_OUT[:64])
    grpo.main([f"--out={tmp_path}"])
    [result] = tables.read(tmp_path / "result.csv")
    assert 0.05 < result["sampled_before"] < 0.3 < 0.4 < result["sampled_after"]
    rewards = [step["reward"] for step in tables.read(tmp_path / "steps.csv")]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.2
