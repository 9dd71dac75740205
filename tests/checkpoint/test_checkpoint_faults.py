"""What can go wrong around a run of `examples/resume.py`, with real processes.

The law: after any fault, every checkpoint that is there is whole, the error says what happened,
and the run that goes on has the losses, to the last bit, of the one that was never stopped.
"""

import pathlib
import re
import signal
import subprocess
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import processes
import pytest
import resume

from jlora import checkpoint

OFTEN = ["--save-every=2", "--keep=3"]
EXAMPLE = str(pathlib.Path(__file__).parents[2] / "examples" / "resume.py")
SMALL = ["--layers=1", "--length=8", "--batch=4", "--sentences=50", "--rank=2"]


class Run:
    """Runs of the example with the same settings, in a folder each."""

    def __init__(self, folder: pathlib.Path, steps: int):
        """A whole run to compare with."""
        self.folder, self.steps = folder, steps
        assert self.here("whole") == steps
        self.losses = self.log("whole")
        assert len(self.losses.splitlines()) == steps

    def arguments(self, name: str, *more: str) -> list[str]:
        """Those of the command line."""
        return [f"--out={self.folder / name}", f"--steps={self.steps}", *SMALL, "--resume", *more]

    def here(self, name: str, *more: str) -> int:
        """Runs in this process, to the end, which is given; a start costs as much as the steps."""
        args = resume.parse(self.arguments(name, *more))
        with resume.lock(args.out):
            return resume.train(args)

    def start(self, name: str, *more: str) -> subprocess.Popen[str]:
        """Starts a process; of those with the same `name` each goes on where the last one was."""
        env = processes.cached(self.folder / "cache")
        return processes.start(EXAMPLE, *self.arguments(name, *more), env=env)

    def log(self, name: str) -> str:
        """The losses so far."""
        path = self.folder / name / "losses.txt"
        return path.read_text() if path.exists() else ""

    def wait(self, process: subprocess.Popen[str], name: str, steps: int) -> None:
        """Waits until the process has taken `steps` steps, or has ended."""
        assert process.stdout is not None
        found = None
        while found is None and (line := process.stdout.readline()):
            found = re.match(r"from step (\d+)", line)
        target = int(found[1]) + steps if found else self.steps
        while process.poll() is None and self.log(name).count("\n") < min(target, self.steps):
            time.sleep(0.001)

    def check(self, name: str) -> list[int]:
        """Every checkpoint must be whole and every line right; gives the steps."""
        whole = self.losses.splitlines(keepends=True)
        assert all(map(str.startswith, whole, self.log(name).splitlines(keepends=True)))
        folder = self.folder / name / "checkpoints"
        steps = sorted(int(x.name) for x in folder.glob("*") if x.name.isdigit())
        for step in steps:
            assert checkpoint.read(folder / str(step)).step == step
            checkpoint.restore(folder / str(step))  # checks the hash of every array
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax:
                args = {"rest": ocp.args.StandardRestore(), "run": ocp.args.JsonRestore()}
                saved = orbax.restore(folder / str(step), args=ocp.args.Composite(**args))
            assert saved["run"].keys() == {"epoch", "position", "settings"}
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(saved["rest"]["optimizer"]))
        return steps


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Short runs."""
    return Run(tmp_path_factory.mktemp("runs"), steps=40)


@pytest.mark.slow
def test_a_run_that_is_killed_and_then_preempted_goes_on_as_if_it_had_not_been(run, capsys):
    """On SIGTERM it saves and stops; it has its folder alone."""
    process = run.start("endless", "--steps=100000", *OFTEN)
    run.wait(process, "endless", 5)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    assert run.check("endless")
    process = run.start("endless", "--steps=100000", "--save-every=100000")
    run.wait(process, "endless", 1)
    with (
        pytest.raises(SystemExit, match=r"endless is in use by another run: give another --out\."),
        resume.lock(run.folder / "endless"),
    ):
        pass
    process.terminate()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    *_, step = run.check("endless")
    assert run.log("endless").count("\n") == step < 100000
    steps = max(step + 2, run.steps)
    assert run.here("endless", f"--steps={steps}") == steps
    assert f"from step {step} of" in capsys.readouterr().out
    assert run.log("endless").startswith(run.losses)
