"""The group of commands; each command is a module."""

import logging
import os
import sys

import click
import jax

from ._check import check
from ._command import ERROR
from ._convert import convert
from ._diff import diff
from ._inspect import inspect
from ._merge import merge
from ._plan import plan


@click.group(
    "jlora",
    commands=[inspect, merge, convert, diff, check, plan],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, equal, or it fits; 1 the adapters differ, it does not fit, or an "
    "engine refuses or drops a part of it; 2 an error; 130 interrupted.",
)
@click.version_option(package_name="jlora", prog_name="jlora")
def cli() -> None:
    """Inspect, compare, convert, merge and check LoRA adapters; plan training.

    Nothing is ever overwritten. Output appears complete or not at all.
    """
    # Errors contain the useful part of Orbax's logs.
    logging.getLogger("absl").setLevel(logging.ERROR)


def main() -> None:
    """Runs the command line, on the CPU unless JAX_PLATFORMS names another."""
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    sys.unraisablehook = _report_unraisable
    if sys.stdout is None:
        click.echo("jlora: standard output is closed: there is no place for an answer.", err=True)
        sys.exit(ERROR)
    cli(prog_name="jlora")


def _report_unraisable(x: "sys.UnraisableHookArgs") -> None:
    """Reports errors as Python does, except the one of Orbax's thread after a refused load."""
    if not isinstance(x.exc_value, RuntimeError) or str(x.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(x)
