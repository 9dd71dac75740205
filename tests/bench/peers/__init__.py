"""Other libraries on the same work, each in its own environment, beside jlora and the floor.

Every ratio comes from one process in which the peer's step, jlora's and the floor take turns; that
with PEFT comes from two, torch's and JAX's, that take turns on the same CPUs. A peer that cannot
do something has a row that says why.
"""

from collections.abc import Collection, Mapping

from . import environment

# Module -> environment.
PEERS = {
    "dense_peer": "flax",
    "qwix_peer": "qwix",
    "gemma_peer": "gemma",
    "nnx_peer": "flax",
    "quax_peer": "quax",
}


# What is imported late imports JAX: the torch process, which imports this package, does without.
def run(quick: bool) -> None:
    """Both tables; quick: only what needs no environment, and asserts what XLA counts."""
    from .. import floor, report
    from . import bert

    rows = in_process() if quick else in_environments(PEERS, floor.MODES, 10)
    report.table("peers: ratios of step times and temporary memory", rows)
    if quick:
        print("\nThe other libraries are left out: their environments take minutes to make.")
    else:
        report.table("peft: milliseconds a step, and ratios", [bert.run(rounds=10)])


def in_process() -> list[dict]:
    """The peer that is plain JAX, on the tiny model."""
    from .. import floor
    from . import compare, dense_peer

    peer, rows = dense_peer.PEER, []
    for mode in ("plain", "scan+remat"):
        row = compare.label(peer, floor.TINY, mode) | compare.measure(peer, floor.TINY, mode, 3)
        assert row["FLOPs"] > 1, f"{mode}: jlora computes more than W + A·B"
        rows.append(row)
    return rows


def in_environments(peers: Mapping[str, str], modes: Collection[str], rounds: int) -> list[dict]:
    """The rows of each module of `peers`, from its environment."""
    from jlora._progress import progress

    from .. import floor

    arguments = ["--rounds", str(rounds), "--modes", *modes]
    rows: list[dict] = []
    with progress(total=len(peers) * len(floor.SHAPES) * len(modes)) as bar:
        for module, name in peers.items():
            bar.set_description(module)
            try:
                with environment.start(name, module, arguments) as child:
                    for row in child:
                        rows.append(row)
                        bar.update()
            except environment.PeerError as error:
                rows.append({"peer": module, "note": str(error)})
    return rows
