"""`python examples/paper ablations`: a run from a table with a gap, and pictures of adapters."""

import numpy as np
import pytest
import tables
from paper import ablations


@pytest.mark.slow
def test_only_what_is_missing_is_done(tmp_path):
    """And its row says what was measured; the picture is drawn."""
    table, missing = tmp_path / "ablations.csv", ablations.Run("movies", "k", 8, 0)
    row = {"steps": 2, "batch": 32, "parameters": 1, "score": 0.5, "standard_error": 0.1}
    for run in ablations.all_runs(["movies"], [0]):
        if run != missing:
            tables.append(table, {**run._asdict(), **row, "seconds": 1})
    grids = {f"{part}/a/ranks": np.full((8, 64), 0.5) for part in ("query", "value")}
    for task in ablations.TASKS:
        np.savez(tmp_path / f"{task}.npz", **grids)
    before, argv = ablations.read(table), "--tasks movies --seeds 0 --steps 2"
    ablations.main([*argv.split(), f"--results={tmp_path}", f"--out={tmp_path / 'out'}"])
    after = ablations.read(table)
    row = after.pop(missing)
    assert after == before
    assert (row["steps"], row["parameters"]) == (2, 6 * 2 * 384 * 8)
    assert 0.4 < row["score"] < 0.9
    error = (row["score"] * (1 - row["score"]) / 947) ** 0.5
    assert row["standard_error"] == pytest.approx(error, 1e-3)
    assert (tmp_path / "ablations.png").stat().st_size > 10_000
