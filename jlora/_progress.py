"""Progress of long work: a bar on a terminal, elsewhere a line every ten seconds."""

import io
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

SECONDS = 10.0


class progress(tqdm):  # noqa: N801  used as tqdm is
    """`tqdm` that writes lines if standard error is not a terminal, also within a long step."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Takes the arguments of `tqdm`."""
        self._ended = threading.Event()
        self._has_lines = not (sys.stderr.isatty() or options.get("disable"))
        if self._has_lines:
            options |= {"file": io.StringIO(), "ncols": 0, "delay": float("inf")}
        super().__init__(*args, **options)
        if self._has_lines:
            arguments = weakref.ref(self), self._ended
            threading.Thread(target=_write_lines, args=arguments, daemon=True).start()

    def __iter__(self) -> Iterator[Any]:
        """Counts each step when it ends."""
        if not self._has_lines:
            yield from super().__iter__()
            return
        with self:
            for x in self.iterable:
                yield x
                self.update()

    def close(self) -> None:
        """Ends the bar, or the lines."""
        self._ended.set()
        super().close()


def _write_lines(bar: weakref.ref, ended: threading.Event) -> None:
    while not ended.wait(SECONDS) and (shown := bar()) is not None:
        sys.stderr.write(f"{shown}\n")  # at once: other lines may be written meanwhile
        sys.stderr.flush()
        del shown
