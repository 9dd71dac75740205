"""The commands as the shell sees them; each is a module of its own."""

import logging
import os
import sys
from typing import Any

import click
import jax

from ._check import check
from ._combine import combine
from ._convert import convert
from ._diff import diff
from ._inspect import inspect
from ._merge import merge
from ._plan import plan


@click.group(
    "jlora",
    commands=[inspect, merge, convert, combine, diff, check, plan],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, equal, or it fits; 1 the adapters differ, or it does not fit, or "
    "an engine would not take it; 2 an error; 130 interrupted.",
)
@click.version_option(package_name="jlora", prog_name="jlora")
def cli() -> None:
    """Look at, compare, combine, convert, merge and check LoRA adapters; plan training.

    Nothing is ever overwritten, and what is written appears complete or not at all.
    """
    # An error says what matters of what Orbax logs.
    logging.getLogger("absl").setLevel(logging.ERROR)


def main() -> None:
    """Runs the command line, on the CPU unless JAX_PLATFORMS names another platform."""
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    sys.unraisablehook = _report_unraisable
    cli(prog_name="jlora")


def _report_unraisable(x: Any) -> None:
    """Reports errors as Python does, but hides that of Orbax's thread after a refused load."""
    if not isinstance(x.exc_value, RuntimeError) or str(x.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(x)
