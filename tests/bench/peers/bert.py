"""PEFT in torch against jlora in JAX: the same BERT, batch, loss, optimizer and CPUs."""

import tempfile

import numpy as np
from tqdm import tqdm

from .. import steps
from . import bert_work, environment

STEPS = 3  # in a turn, of which the median counts


def compare(rounds: int) -> dict:
    """A row of milliseconds and ratios, or of the reason why there is none."""
    sizes = bert_work.SIZES
    tokens = bert_work.BATCH * bert_work.LENGTH
    shape = f"{sizes['num_hidden_layers']} layers, d={sizes['hidden_size']}, {tokens} tokens"
    try:
        return {"model": shape, "CPUs": environment.cpus(), **measure(rounds)}
    except environment.PeerError as error:
        return {"model": shape, "note": str(error)}


def measure(rounds: int) -> dict:
    """Starts both processes, compares what they compute, and lets them take turns."""
    with (
        tempfile.TemporaryDirectory() as folder,
        environment.start("peft", "bert_torch", [folder]) as torch,
    ):
        theirs = torch.answer()
        with environment.start("peft", "bert_jax", [folder]) as jax:
            ours = jax.answer()
            check(theirs, ours)
            times = interleave({"torch": torch, "jax": jax}, rounds)
    return {
        "PEFT ms": 1e3 * float(np.median(times["torch", "lora"])),
        "torch floor ms": 1e3 * float(np.median(times["torch", "floor"])),
        "jlora ms": 1e3 * float(np.median(times["jax", "lora"])),
        "JAX floor ms": 1e3 * float(np.median(times["jax", "floor"])),
        "PEFT/jlora": steps.ratio(times["torch", "lora"], times["jax", "lora"]),
        "PEFT/torch floor": steps.ratio(times["torch", "lora"], times["torch", "floor"]),
        "jlora/JAX floor": steps.ratio(times["jax", "lora"], times["jax", "floor"]),
        "trained": ours["trained"],
        "versions": theirs["versions"],
    }


def check(theirs: dict, ours: dict) -> None:
    """As many trained parameters, and the same loss before the first step."""
    if theirs["trained"] != ours["trained"]:
        raise environment.PeerError(f"PEFT trains {theirs['trained']:,}, not {ours['trained']:,}")
    losses = theirs["losses"] + ours["losses"]
    if max(losses) - min(losses) > 1e-4:
        raise environment.PeerError(f"losses of torch, PEFT and JAX differ: {losses}")


def interleave(
    children: dict[str, environment.Child], rounds: int
) -> dict[tuple[str, str], np.ndarray]:
    """Seconds a step of each child's floor and LoRA, in turns, after a round of warm-up."""
    turns = [(child, program) for program in ("floor", "lora") for child in children]
    seconds: dict[tuple[str, str], list[float]] = {turn: [] for turn in turns}
    for _ in tqdm(range(rounds + 1), "PEFT", leave=False, disable=None):
        for child, program in turns:
            answer = children[child].ask(f"{program} {STEPS}")
            seconds[child, program].append(float(np.median(answer["seconds"])))
    return {turn: np.array(values[1:]) for turn, values in seconds.items()}
