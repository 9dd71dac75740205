"""`jlora plan`: what a job needs on a slice that is not there."""

import contextlib
import os
import sys

import jax

from .. import _compat
from .._planning import has_compiler, mesh_of, parse
from .._planning import plan as make
from .._planning._placed import mesh_of_leaves
from ._command import Answer
from ._inputs import attribute
from ._words import called

WITHOUT = 'activations need the compiler for TPUs, which is not installed: pip install "jax[tpu]"'


def plan(job: str, topology: str, mesh: str, *, fast: bool, arithmetic: bool) -> Answer:
    """Calls the user's function with a mesh of the topology, and plans what it returns."""
    with called(topology=("--topology", None), mesh=("--mesh", None)):
        chip, _ = parse(topology)
        where = mesh_of(topology, _axes(mesh))
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    with jax.enable_x64(False):
        returned = attribute(job, "JOB")(where)
        if not isinstance(returned, tuple) or not 4 <= len(returned) <= 5:
            raise ValueError(
                f"JOB: {job} must return (loss, base, adapter, args) or (loss, base, adapter, "
                f"args, tx), as jlora.plan takes them; got {type(returned).__name__}."
            )
        if mesh_of_leaves(returned[1:4]) is None:
            raise ValueError(
                f"JOB: nothing that {job} returned is on the mesh that it was given. Give each "
                "leaf of the base and of the arguments its place, jax.ShapeDtypeStruct(shape, "
                "dtype, sharding=NamedSharding(mesh, spec))."
            )
        found = make(
            *returned,
            capacity=chip.capacity,
            compile=False if arithmetic else None,
            compiler_options=_compat.HURRIED if fast else None,
        )
    found = found._replace(device=chip.kind)
    text = str(found) if has_compiler() or arithmetic else f"{found}\n{WITHOUT}"
    numbers = found._asdict()
    del numbers["program"]
    fields = {"topology": topology, **numbers, "fits": found.fits}
    return Answer(text, fields, int(found.fits is False))


def _axes(text: str) -> dict[str, int]:
    """`fsdp=16,tensor=8` as a dict."""
    axes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        with contextlib.suppress(ValueError):
            axes[name.strip()] = int(size)
        if axes.get(name.strip(), 0) < 1 or not name.strip().isidentifier():
            raise ValueError(f"--mesh: expected axes such as fsdp=16,tensor=8; got {text!r}.")
    return axes
