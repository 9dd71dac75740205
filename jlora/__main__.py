"""The command `jlora`, and `python -m jlora`."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Runs the command line. Ctrl-C ends it with one line, also while its modules are imported."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not ignored, as it is in the background
        signal.signal(signal.SIGINT, _stop)
    from ._cli import main

    signal.signal(signal.SIGINT, before)
    main()


def _stop(number: int, frame: FrameType | None) -> None:
    """Ends the process immediately: some modules turn an exception into another one."""
    print("jlora: interrupted; nothing is half written.", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(130)


if __name__ == "__main__":
    main()
