"""What runs in a peer's environment: its step, jlora's and the floor of one model, in turns."""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import Any, NamedTuple

import jax

from .. import floor, model, steps

RANK = 8
ALPHA = 16


class Model(NamedTuple):
    """A model before anything is adapted.

    Attributes:
        module: what the peer adapts.
        apply: logits from parameters (a nested dict of arrays) and token ids.
        params: the parameters.
    """

    module: Any
    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any


class Tuned(NamedTuple):
    """A model as a peer adapts it, at B = 0.

    Attributes:
        apply: logits from the frozen and the trained parameters and token ids.
        frozen: the frozen parameters.
        trained: the low-rank factors.
    """

    apply: Callable[[Any, Any, jax.Array], jax.Array]
    frozen: Any
    trained: Any


@dataclasses.dataclass(frozen=True)
class Peer:
    """A library to compare with.

    Attributes:
        name: as the table calls it.
        version: of the library.
        layout: which of the twins it adapts.
        make: builds the model of a shape, with or without scan and remat.
        attach: adapts a model whose input are the given token ids.
    """

    name: str
    version: str
    layout: str
    make: Callable[..., Model]
    attach: Callable[[Model, jax.Array], Tuned]


def linen(module: Any) -> Model:
    """The model of a linen module of token ids."""
    ids = jax.numpy.zeros((1, 1), int)
    return Model(module, module.apply, jax.jit(module.init)(jax.random.key(0), ids))


def version(package: str) -> str:
    """The installed version."""
    return metadata.version(package)


def label(peer: Peer, shape: model.Shape, mode: str) -> dict:
    """The columns that say what was measured."""
    names = {"peer": peer.name, "version": peer.version, "kernels": peer.layout}
    return {**names, "model": str(shape), "mode": mode}


def rows(
    peer: Peer, shapes: Iterable[model.Shape], modes: Iterable[str], rounds: int
) -> Iterator[dict]:
    """A row for each shape and mode: of numbers, or of the reason why there are none."""
    for shape in shapes:
        for mode in modes:
            try:
                found = measure(peer, shape, mode, rounds)
            except Exception as error:  # whatever the peer raises is its answer
                found = {"note": reason(error)}
            yield label(peer, shape, mode) | found


def measure(peer: Peer, shape: model.Shape, mode: str, rounds: int) -> dict:
    """Times and temporary memory of the peer and of jlora, as ratios to the floor's."""
    ids = model.token_ids(shape)
    base = peer.make(shape, **floor.MODES[mode])
    tuned = peer.attach(base, ids[:, :-1])

    def loss(frozen: Any, trained: Any, ids: jax.Array) -> jax.Array:
        return steps.next_token(lambda frozen, x: tuned.apply(frozen, trained, x), frozen, ids)

    before = float(jax.jit(steps.next_token, static_argnums=0)(base.apply, base.params, ids))
    error = abs(float(jax.jit(loss)(tuned.frozen, tuned.trained, ids)) - before)
    # As in jlora's program: no product may be zero, or it might be cheaper.
    trained = jax.tree.map(lambda x: x + 0.01, tuned.trained)
    programs = {
        "floor": steps.leaves_task(base.apply, base.params, "norm").compile(ids),
        "jlora": steps.lora_task(base.apply, base.params, model.all_linear(RANK), ids).compile(ids),
        "peer": steps.compile_step(loss, tuned.frozen, trained, ids),
    }
    theirs, ours = (count(programs[name].trained) for name in ("peer", "jlora"))
    if theirs != ours:
        raise ValueError(f"trains {theirs:,} parameters, jlora {ours:,}")
    if error > 1e-5:
        raise ValueError(f"the loss at B = 0 differs from the base model's by {error:.1e}")
    seconds = steps.interleave(programs, ids, rounds, f"{peer.name}, {shape}, {mode}")
    temp = {name: program.temp / programs["floor"].temp for name, program in programs.items()}
    return {
        "peer/floor": steps.ratio(seconds["peer"], seconds["floor"]),
        "jlora/floor": steps.ratio(seconds["jlora"], seconds["floor"]),
        "peer/jlora": steps.ratio(seconds["peer"], seconds["jlora"]),
        "floor ms": steps.median(seconds["floor"]),
        "peer temp": temp["peer"],
        "jlora temp": temp["jlora"],
        "FLOPs": programs["peer"].flops / programs["jlora"].flops,
        "trained": theirs,
        "loss error": f"{error:.0e}",
    }


def count(tree: Any) -> int:
    """The number of parameters."""
    return sum(x.size for x in jax.tree.leaves(tree))


def reason(error: Exception) -> str:
    """The error in one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:90]}{'…' * (len(words) > 90)}"


def main(peer: Peer) -> None:
    """The command line of a peer's module: prints the rows as JSON, one a line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=floor.MODES, default=list(floor.MODES))
    options = parser.parse_args()
    for row in rows(peer, floor.SHAPES, options.modes, options.rounds):
        print(json.dumps(row), flush=True)
