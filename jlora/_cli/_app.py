"""The commands as the shell sees them; each one's work is a module of its own."""

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

import click
import jax

from ._command import Command

FOLDER = click.Path(path_type=Path)
NAMES = """Name table between JAX's paths and PyTorch's modules: bert, roberta, gpt2, llama,
llama-scanned, vit, tunix-llama3, tunix-qwen2, tunix-qwen3, tunix-qwen3-experts, tunix-gemma,
gemma3, gemma2-2b, keras-hub-llama3, keras-hub-qwen3, keras-hub-gemma3, maxtext-llama,
maxtext-qwen3, easydel, module:ATTRIBUTE or file.py:ATTRIBUTE."""


@click.group(
    "jlora",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, equal, or it fits; 1 the adapters differ, or it does not fit, or "
    "an engine would not take it; 2 an error; 130 interrupted.",
)
@click.version_option(importlib.metadata.version("jlora"), prog_name="jlora")
def cli() -> None:
    """Look at, compare, combine, convert, merge and check LoRA adapters; plan training.

    Nothing is ever overwritten, and what is written appears complete or not at all.
    """


@cli.command(cls=Command)
@click.argument("folder", type=FOLDER, metavar="DIR")
@click.option("--all", "every", is_flag=True, help="A row for each matrix of a stack.")
def inspect(folder: Path, every: bool) -> Any:
    """Show the sites of the adapter in DIR, and how much each changes its weight.

    Of a quantized model: its matrices and what they take.

    For each site: inputs × outputs, rank r, scale s, the Frobenius norm of ΔW = s·A·B, its stable
    and effective rank, and its largest singular values, computed from A and B alone. Of stacked
    layers and experts: the median (least…largest).
    """
    from ._inspect import inspect

    return inspect(folder, every=every)


@cli.command(cls=Command)
@click.argument("base", type=FOLDER)
@click.argument("adapter", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--names", metavar="TABLE", help=NAMES)
@click.option("--follow-links", is_flag=True, help="Copy what links out of BASE point to.")
def merge(base: Path, adapter: Path, out: Path, **options: Any) -> Any:
    """Write the model BASE with ADAPTER merged into its weights to OUT.

    BASE is a checkpoint of Hugging Face (safetensors), or the parameters in Orbax, and OUT is
    like it: same files, names and dtypes; of a quantized one plain floats. ADAPTER is one of
    PEFT or of Orbax. --names is needed where one of them is of PyTorch and the other of JAX.
    """
    from ._write import merge

    return merge(base, adapter, out, **options)


@cli.command(cls=Command)
@click.argument("source", type=FOLDER, metavar="IN")
@click.argument("out", type=FOLDER)
@click.option(
    "--profile", type=click.Choice(["vllm"]), help="Write PEFT's format as vLLM takes it."
)
@click.option("--names", metavar="TABLE", help=NAMES)
@click.option(
    "--base",
    type=FOLDER,
    help="The base's parameters in Orbax, or an adapter in Orbax that was saved with its base. "
    "Needed to write Orbax; only shapes are read then.",
)
@click.option("--config", type=FOLDER, help="An adapter of PEFT whose configuration is kept.")
def convert(source: Path, out: Path, **options: Any) -> Any:
    """Write the adapter IN, of Orbax or PEFT, to OUT in the other format.

    With --profile vllm OUT is always PEFT's: one rank for all modules and the scales in B. All
    values are kept bit for bit, but for that scaling.
    """
    from ._write import convert

    return convert(source, out, **options)


@cli.command(cls=Command)
@click.argument("adapters", type=FOLDER, nargs=-1, required=True)
@click.argument("out", type=FOLDER)
@click.option("--weights", metavar="W,W,…", help="A number for each adapter; 1 unless told.")
@click.option(
    "--method", type=click.Choice(["add", "ties", "dare"]), default="add", show_default=True
)
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True),
    help="The share of entries that ties keeps (0.2 unless told), or dare (0.5).",
)
@click.option("--seed", type=click.IntRange(0), help="What dare draws by; 0 unless told.")
@click.option("--rank", type=click.IntRange(1), help="Cut each site to this rank, if it has more.")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="Or to the least rank that keeps this share of ‖ΔW‖².",
)
def combine(adapters: tuple[Path, ...], out: Path, **options: Any) -> Any:
    """Write the weighted sum of ADAPTERS, or their merge by another method, to OUT.

    All are PEFT's, and so is OUT, or all are of Orbax. The model is not needed. What is added are
    the ΔW = s·A·B, not A and B: the sum is exact, and of the sum of the ranks unless it is cut.
    Values are computed and written in float32, or float64 where the adapters are.
    """
    from ._combine import combine

    return combine(adapters, out, **options)


@cli.command(cls=Command)
@click.argument("a", type=FOLDER)
@click.argument("b", type=FOLDER)
@click.option("--names", metavar="TABLE", help=NAMES + " Needed if A and B differ in format.")
@click.option(
    "--tolerance",
    type=float,
    help="Take sites as equal whose ΔW differ by no more, relative to A's, whatever their rank.",
)
def diff(a: Path, b: Path, names: str | None, tolerance: float | None) -> Any:
    """Compare the adapters A and B: exit code 0 if they are equal in every bit, 1 if not.

    For each site that differs: ‖ΔW_A - ΔW_B‖ / ‖ΔW_A‖, and what differs.
    """
    from ._diff import diff

    return diff(a, b, names=names, tolerance=tolerance)


@cli.command(cls=Command)
@click.argument("folder", type=FOLDER, metavar="DIR")
@click.option(
    "--for",
    "engine",
    metavar="ENGINE",
    required=True,
    help="vllm, tpu-inference (vLLM on TPUs) or sglang.",
)
@click.option(
    "--base",
    type=FOLDER,
    help="The model that is served, a checkpoint of Hugging Face, with which names and shapes are "
    "compared. Only its configuration and headers are read.",
)
@click.option("--max-lora-rank", type=int, help="The server's option, if it is given one.")
def check(folder: Path, engine: str, base: Path | None, max_lora_rank: int | None) -> Any:
    """Show what ENGINE refuses of the adapter of PEFT in DIR, and what it drops silently.

    Exit code 1 with a remedy for each, or 0 and how to start the engine.
    """
    from ._check import check

    return check(folder, engine, base=base, max_lora_rank=max_lora_rank)


@cli.command(cls=Command)
@click.argument("job")
@click.option(
    "--topology", metavar="CHIP:SHAPE", required=True, help="The TPU slice, such as v5p:4x4x8."
)
@click.option(
    "--mesh", required=True, metavar="AXES", help="The mesh over it, such as fsdp=16,tensor=8."
)
@click.option(
    "--fast", is_flag=True, help="Compile without most optimizations, in a fraction of the time."
)
@click.option("--arithmetic", is_flag=True, help="Do not compile, even if libtpu is installed.")
def plan(job: str, topology: str, mesh: str, fast: bool, arithmetic: bool) -> Any:
    """Show what a training step needs on each device of a TPU slice, without the slice.

    JOB is module:FUNCTION or file.py:FUNCTION. The function takes the mesh and returns the
    arguments of jlora.plan: (loss, base, adapter, args) or (loss, base, adapter, args, tx), as
    shapes with shardings on the mesh. With libtpu installed the step is compiled for the slice;
    without it, all but the activations is known.
    """
    from ._plan import plan

    return plan(job, topology, mesh, fast=fast, arithmetic=arithmetic)


def main() -> None:
    """The entry point: on the CPU, where the work is, unless JAX_PLATFORMS says otherwise."""
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    sys.unraisablehook = _report_unraisable
    cli(prog_name="jlora")


def _report_unraisable(x: Any) -> None:
    """As Python does, but for a thread of Orbax's that ends after a load that was refused."""
    if not isinstance(x.exc_value, RuntimeError) or str(x.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(x)
