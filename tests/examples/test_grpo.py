"""`examples/grpo.py`: its rewards; a run is slow."""

import grpo
import numpy as np
import pytest
import tables


def test_rewards_and_advantages():
    """The number counts, not what follows; a group whose answers are alike says nothing."""
    answers = ("19\n6", "19", "190", "1", "019")
    assert [grpo.reward((14, 5), x) for x in answers] == [1, 1, 0, 0, 0]
    found = grpo.advantages(np.array([[0.0, 1.0], [1.0, 1.0]]))
    np.testing.assert_allclose(found, [[-1, 1], [0, 0]], atol=1e-3)


@pytest.mark.slow
def test_smollm2_learns(tmp_path, monkeypatch):
    """Some sums are right at the start, and many more after some steps."""
    monkeypatch.setattr(grpo, "HELD_OUT", grpo.HELD_OUT[:64])
    grpo.main([f"--out={tmp_path}"])
    [result] = tables.read(tmp_path / "result.csv")
    assert 0.05 < result["sampled_before"] < 0.3 < 0.4 < result["sampled_after"]
    rewards = [step["reward"] for step in tables.read(tmp_path / "steps.csv")]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.2
