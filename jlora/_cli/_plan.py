"""`jlora plan`: the memory of a job on a TPU slice, without the slice."""

import os
import re
import sys

import click
import jax

import jlora

from .. import _compat
from .._planning import has_compiler, mesh_of, mesh_of_leaves, parse_topology
from ._command import Answer, Command, call
from ._inputs import attribute

WITH = "compiled with jlora.compiler_options(): give jax.jit the same compiler_options"
WITHOUT = 'activations are unknown without the compiler for TPUs: pip install "jax[tpu]"'


@click.command(cls=Command)
@click.argument("job")
@click.option(
    "--topology", metavar="CHIP:SHAPE", required=True, help="The TPU slice, such as v5p:4x4x8."
)
@click.option(
    "--mesh", metavar="AXES", required=True, help="The mesh over it, such as fsdp=16,tensor=8."
)
@click.option(
    "--fast", is_flag=True, help="Compile without most optimizations, in a fraction of the time."
)
@click.option("--arithmetic", is_flag=True, help="Do not compile, even if libtpu is installed.")
def plan(job: str, topology: str, mesh: str, fast: bool, arithmetic: bool) -> Answer:
    """Show the memory of a training step on a TPU slice.

    Shows what each device needs, without the slice. JOB is module:FUNCTION or file.py:FUNCTION. The
    function gets the mesh, and returns the arguments of jlora.plan: (loss, base, adapter, args) or
    (loss, base, adapter, args, tx), as shapes with shardings on the mesh. With libtpu installed,
    the step is compiled for the slice, with jlora.compiler_options(). Without it, everything but
    the activations is known.
    """
    chip, _ = call(parse_topology, topology)
    where = call(mesh_of, topology, _axes(mesh))
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    with jax.enable_x64(False):
        returned = attribute(job, "JOB")(where)
        if not isinstance(returned, tuple) or not 4 <= len(returned) <= 5:
            raise ValueError(
                f"JOB: {job} must return (loss, base, adapter, args) or (loss, base, adapter, "
                f"args, tx), the arguments of jlora.plan; got {type(returned).__name__}."
            )
        if mesh_of_leaves(returned[1:4]) is None:
            raise ValueError(
                f"JOB: no leaf that {job} returned is on the mesh that it got. Give each leaf of "
                "the base and of the arguments a sharding: jax.ShapeDtypeStruct(shape, dtype, "
                "sharding=NamedSharding(mesh, spec))."
            )
        options = {} if arithmetic else jlora.compiler_options("tpu")
        found = jlora.plan(
            *returned,
            capacity=chip.capacity,
            compile=False if arithmetic else None,
            compiler_options=options | (_compat.HURRIED if fast else {}),
        )
    found = found._replace(device=chip.kind)
    note = "" if arithmetic else f"\n{WITH if has_compiler() else WITHOUT}"
    fields = {"topology": topology, **found._asdict(), "fits": found.fits}
    del fields["program"], fields["missing_options"]  # none is missing
    return Answer(f"{found}{note}", fields, int(found.fits is False))


def _axes(text: str) -> dict[str, int]:
    """Parses axes such as `fsdp=16,tensor=8`."""
    found = [re.fullmatch(r"\s*([^\W\d]\w*)\s*=\s*0*([1-9]\d*)\s*", x) for x in text.split(",")]
    if None in found:
        raise ValueError(f"--mesh: expected axes such as fsdp=16,tensor=8; got {text!r}.")
    return {x[1]: int(x[2]) for x in found if x}
