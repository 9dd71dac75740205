"""The command line: `python -m tests.bench [--quick] [NAME ...]`."""

import argparse
import importlib
import os
import sys

from jlora._progress import progress

from . import steps

# Machine code that is made fast, not that runs fast: what XLA counts is known before it is made.
FAST_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
NAMES = ("floor", "real", "memory", "quantized", "peers", "growth", "adapters", "sweep")
NAMES += ("overheads", "h100")
BY_NAME = ("tpu", "fusions", "gpu", "logits")  # need the compilers for these


def main() -> None:
    """Runs each benchmark's `run(quick)`."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    default = f"default: all but {' and '.join(BY_NAME)}"
    parser.add_argument("names", nargs="*", choices=[*NAMES, *BY_NAME, []], help=default)
    parser.add_argument("--quick", action="store_true", help="small, for CI; asserts what is exact")
    options = parser.parse_args()
    if options.quick:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_TO_COMPILE}"
    steps.keep_memory()
    # Compiling, and making the environments of `peers`, take minutes within one step of a bar.
    shown = progress(options.names or NAMES, "benchmarks", disable=sys.stderr.isatty())
    for name in shown:
        importlib.import_module(f"{__package__}.{name}").run(options.quick)


if __name__ == "__main__":
    main()
