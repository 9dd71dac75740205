"""`jlora.plan` compiled for TPU slices that are not there, by libtpu."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from small import without_progress

pytest.importorskip("libtpu")

JOBS = pathlib.Path(__file__).parent / "plan_jobs.py"
SLICE = ("--topology", "v5e:2x2", "--mesh", "fsdp=2,tensor=2")


def run(job, *args, code=0):
    """`jlora plan` in a process of its own; nothing but the answer is printed."""
    command = [sys.executable, "-m", "jlora", "plan", f"{JOBS}:{job}", *SLICE, *args]
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    stderr = without_progress(done.stderr)
    assert (done.returncode, stderr) == (code, ""), done.stdout + done.stderr
    return done.stdout


def test_compiled():
    """What is exact is the same without a compiler."""
    found = json.loads(run("job", "--fast", "--json"))
    exact = json.loads(run("job", "--arithmetic", "--json"))
    assert (found["devices"], found["device"], found["fits"]) == (4, "TPU v5 lite", True)
    compiled = {"activations", "peak", "fits"}
    assert {k for k in found if found[k] != exact[k]} == compiled | {"unconstrained"}
    assert found["unconstrained"]
    assert found["peak"] > found["activations"] > 0
    assert {exact[k] for k in compiled} == {None}


def test_what_does_not_fit():
    """Out of memory at compile time is an answer, with the bytes that it would take."""
    found = json.loads(run("large", "--fast", "--json", code=1))
    assert found["fits"] is False
    assert found["peak"] > found["base"] + found["adapter"] + found["moments"] > found["capacity"]
    assert found["capacity"] == int(15.75 * 2**30)
