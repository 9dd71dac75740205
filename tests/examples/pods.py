"""Runs of `examples/pod.py` in real processes, for `test_pod.py`; none outlives its test."""

import contextlib
import os
import pathlib
import re
import subprocess
import threading
import time
from collections.abc import Iterator

from processes import cached, free_port, start

EXAMPLE = str(pathlib.Path(__file__).parents[2] / "examples" / "pod.py")
DEVICES = 8
LIMIT = 90  # seconds that a run may take


class Run:
    """The processes of one run."""

    def __init__(self, cache: pathlib.Path, processes: int, *arguments: str):
        """Starts them on eight devices together; `arguments` are those of the command."""
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count="
        env = cached(cache) | {"XLA_FLAGS": f"{flags}{DEVICES // processes}"}
        place = [f"--coordinator=localhost:{free_port()}", f"--num-processes={processes}"]
        self.workers = [
            start(EXAMPLE, "train", *place, f"--process-id={i}", *arguments, env=env)
            for i in range(processes)
        ]
        self.lines: list[list[str]] = [[] for _ in self.workers]
        self.readers = [
            threading.Thread(target=lines.extend, args=(worker.stdout,))
            for lines, worker in zip(self.lines, self.workers, strict=True)
        ]
        for reader in self.readers:
            reader.start()

    def said(self, number: int = 0) -> str:
        """What a process has said so far."""
        return "".join(self.lines[number])

    def losses(self) -> dict[int, float]:
        """The losses so far, by step."""
        return {int(n): float(x) for n, x in re.findall(r"step (\d+): loss (.*)", self.said())}

    def reach(self, step: int) -> None:
        """Waits until the run has taken a step, or a process has ended."""
        end = time.monotonic() + LIMIT
        while step not in self.losses() and all(x.poll() is None for x in self.workers):
            assert time.monotonic() < end, self.report()
            time.sleep(0.01)

    def ends(self, seconds: float = LIMIT) -> list[int]:
        """The exit codes of all processes, which must end in time."""
        end = time.monotonic() + seconds
        try:
            codes = [worker.wait(max(0, end - time.monotonic())) for worker in self.workers]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.report()}") from None
        for reader in self.readers:
            reader.join()
        return codes

    def report(self) -> str:
        """All that was said, for a failing test."""
        codes = [worker.poll() for worker in self.workers]
        return "\n".join(f"== {i}: {c}\n{self.said(i)}" for i, c in enumerate(codes))


@contextlib.contextmanager
def run(cache: pathlib.Path, processes: int, *arguments: str) -> Iterator[Run]:
    """A run, of which nothing is left in the end."""
    started = Run(cache, processes, *arguments)
    try:
        yield started
    finally:
        for worker, reader in zip(started.workers, started.readers, strict=True):
            worker.kill()
            worker.wait()
            reader.join()
            worker.stdout.close()
