"""A virtual environment for each peer, kept between runs, and the modules that run in it."""

import contextlib
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata

ROOT = pathlib.Path(__file__).parents[3]
# As in this process, so that a table's title is true of the peers as well.
COMMON = tuple(f"{name}=={metadata.version(name)}" for name in ("jax", "flax", "optax", "tqdm"))
REQUIREMENTS = {
    "flax": (),
    "qwix": ("qwix==0.1.8",),
    "gemma": ("einops==0.8.2",),
    "quax": ("quax==0.4.6",),
    "peft": ("peft==0.21.2", "torch==2.13.0", "transformers==4.57.6", "safetensors==0.8.0"),
}
# Gemma's own requirements are those of a whole training stack; its `peft` needs few of them.
ALONE = {"gemma": ("gemma==3.3.0",)}

# What `steps.keep_memory` does in this process.
MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}


class PeerError(RuntimeError):
    """An environment could not be made, or a program in it failed."""


def python(name: str) -> pathlib.Path:
    """The interpreter of environment `name`, which is made if its requirements have changed."""
    folder = cache() / name
    stamp, interpreter = folder / "requirements.txt", folder / "bin/python"
    wanted = "\n".join(
        [platform.python_version(), *COMMON, *REQUIREMENTS[name], *ALONE.get(name, ())]
    )
    if not stamp.exists() or stamp.read_text() != wanted:
        call(sys.executable, "-m", "venv", "--clear", folder)
        pip = (interpreter, "-m", "pip", "install", "--quiet")
        call(*pip, *COMMON, *REQUIREMENTS[name])
        if name in ALONE:
            call(*pip, "--no-deps", *ALONE[name])
        stamp.write_text(wanted)
    return interpreter


def cache() -> pathlib.Path:
    """Where the environments are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "jlora" / "bench"


def call(*command: str | pathlib.Path) -> None:
    """Runs a command to its end, which must be a good one."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        said = last_line(done.stderr) or f"exit status {done.returncode}"
        raise PeerError(f"{' '.join(map(str, command))}: {said}")


def start(name: str, module: str, arguments: Sequence[str] = ()) -> "Child":
    """Starts `python -m <this package>.<module>` in environment `name`."""
    return Child(python(name), module, arguments, cache() / f"{module}.log")


class Child:
    """A process that answers in JSON, one object a line; what else it prints is ignored.

    Its standard error goes to a file, and the last line of that into the error if it fails.
    """

    def __init__(
        self, python: pathlib.Path, module: str, arguments: Sequence[str], log: pathlib.Path
    ) -> None:
        """Starts it in the root of the repository."""
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [python, "-m", f"tests.bench.peers.{module}", *arguments],
                cwd=ROOT,
                env={**os.environ, **MEMORY, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )

    def __enter__(self) -> "Child":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process, also one that is at work."""
        self.process.kill()
        self.process.communicate()

    def __iter__(self) -> Iterator[dict]:
        """The answers, until the process ends."""
        for line in self.process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        if code := self.process.wait():
            said = last_line(self.log.read_text()) or f"exit status {code}"
            raise PeerError(f"{said} (all of it in {self.log})")

    def ask(self, question: str) -> dict:
        """The answer to one line."""
        with contextlib.suppress(BrokenPipeError):  # then `answer` says more
            print(question, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict:
        """The next answer."""
        for answer in self:
            return answer
        raise PeerError(f"ended without an answer (see {self.log})")


def cpus() -> int:
    """How many CPUs this process may use: XLA takes as many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def last_line(text: str) -> str:
    """The last line that is not blank."""
    return (text.strip().splitlines() or [""])[-1].strip()
