"""`jlora.plan` compiled for TPU slices that are not there, by libtpu."""

import json
import os
import pathlib
import subprocess
import sys

import plan_jobs
import processes
import pytest
from small import without_progress

import jlora
from jlora._compat import HURRIED
from jlora._planning import _options, mesh_of

pytest.importorskip("libtpu")

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "costs.py"
JOBS = pathlib.Path(__file__).parents[1] / "support" / "plan_jobs.py"
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


def test_the_example_counts():
    """Of a small layer: the frozen step has the fewest operations and bytes, the full one most."""
    sizes = ["--aot", "v5e:2x2", "--sizes", "128,1,1,64"]
    done = processes.run(EXAMPLE, *sizes, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    for what in ("GFLOP", "GB accessed", "GB of memory"):
        frozen, lora, full = (report["steps"][name][what] for name in ("frozen", "LoRA", "full"))
        assert 0 < frozen <= lora <= full, what


def test_options_for_the_compiler(monkeypatch):
    """Those that it knows; a plan of a step that was compiled without them says so."""
    options = jlora.compiler_options("tpu")
    assert options == _options.OPTIONS
    monkeypatch.setitem(_options.OPTIONS, "xla_tpu_no_such_option", True)
    assert jlora.compiler_options("tpu") == options
    job = plan_jobs.job(mesh_of("v5e:2x2", {"fsdp": 2, "tensor": 2}), layers=1)
    bare, with_one, with_all = (
        jlora.plan(*job, compiler_options=HURRIED | given)
        for given in ({}, dict([*options.items()][:1]), options)
    )
    assert bare.missing_options == tuple(options)
    assert with_one.missing_options == tuple(options)[1:]
    assert with_all.missing_options == ()
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{with_one.missing_options[0]}=150")
    [other] = _options.missing_options("tpu", {})
    assert other == bare.missing_options[0]


def test_what_does_not_fit():
    """Out of memory at compile time is an answer, with the bytes that it would take."""
    found = json.loads(run("large", "--fast", "--json", code=1))
    assert found["fits"] is False
    assert found["peak"] > found["base"] + found["adapter"] + found["moments"] > found["capacity"]
    assert found["capacity"] == int(15.75 * 2**30)
