"""`examples/grpo.py` on a small model; SmolLM2-135M itself is slow."""

import grpo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tables
from cases._case import fill
from models import llama, parts
from small import randomize, raw

import jlora

CONFIG = llama.Config(16, 2, 16, 32, 2, 1)
MODEL = llama.Llama(CONFIG)
PARAMS = fill(parts.shapes(MODEL), jnp.float32, 0.3)


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
    """Advantages are those of each group on its own; where answers are alike there are none."""
    answers = {"19\n1": 1, "19": 1, "19+": 1, "190": 0, "1": 0, "9": 0, " 19": 0, "": 0}
    assert {answer: grpo.reward((14, 5), answer) for answer in answers} == answers
    found = grpo.advantages(np.array([[1.0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]))
    expected = [[0] * 4, [0] * 4, [3**0.5, *[-(3**-0.5)] * 3], [1, 1, -1, -1]]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_no_sum_is_held_out_and_trained():
    every = np.concatenate([grpo.HELD_OUT, grpo.TRAIN])
    assert len({*map(tuple, every)}) == len(every) == 810


def test_rollouts_and_kl():
    """Greedy answers are those without a cache; KL is that of the logits of both models."""
    tokenizer, tx = Tokenizer(), optax.sgd(0.0)
    lora = jlora.transform(MODEL.apply, jlora.LoRA(rank=2))
    base, adapter = lora.init(jax.random.key(0), PARAMS, jnp.zeros((1, 2), int))
    adapter = randomize(adapter)
    rollout, step = grpo.make_programs(lora.apply, CONFIG, tokenizer, tx, 0.0)
    [shots], prompts = (
        np.array(tokenizer(x)["input_ids"]) for x in ([grpo.SHOTS], ["12+3=", "98+7="])
    )
    ids, counts = rollout(base, adapter, prompts, jax.random.key(1), 1e-4)
    whole = jnp.column_stack([jnp.tile(shots, (2, 1)), ids])
    found = (jax.nn.log_softmax(lora.apply(base, x, whole[:, :-1])) for x in (adapter, {}))
    own, reference = (x[:, -grpo.TOKENS :] for x in found)
    assert (own.argmax(-1) == ids[:, -grpo.TOKENS :]).all()
    goes_on = np.cumprod(ids[:, -grpo.TOKENS : -1] < 10, 1)
    np.testing.assert_array_equal(counts, np.column_stack([[1, 1], goes_on]))

    at = ids[:, -grpo.TOKENS :, None]
    ratio = jnp.take_along_axis(reference - own, at, -1)[..., 0]
    kl = (jnp.exp(ratio) - ratio - 1) * counts
    expected = (kl.sum(1) / counts.sum(1)).mean()
    state = grpo.State(adapter, tx.init(adapter))
    np.testing.assert_allclose(step(state, base, ids, counts, jnp.ones(2))[1], expected, 1e-4)


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
