"""Reinforcement learning with a server: JAX trains the adapter, vLLM samples with it.

    python examples/serve_rl.py --vllm served/bin/python    # see examples/served.py

Each step writes the adapter, loads it into the running server in place of the last, and samples
answers with their log-probabilities. The gradient is that of the policy, with the importance of
each token between the two programs, min(p_JAX / p_vLLM, 2), as a weight (truncated importance
sampling). A step prints the mean reward, and the largest difference of log-probabilities of a
token, by the adapter of this step and by the one before: the first is rounding if the server
samples with this step's. The reward is the share of letters that are an e. Shapes: B answers, P
tokens of the prompt, T of an answer.
"""

import argparse
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import served
from conversations import load_tokenizer
from jax.tree_util import Partial
from models import llama, smollm2

import jlora
from jlora import peft

PROMPT = "Once upon a time,"
MOST = 2.0  # the largest importance


class Samples(NamedTuple):
    """Answers of the server."""

    ids: np.ndarray  # (B, P + T)
    logs: np.ndarray  # (B, T)
    texts: list[str]


def sample(url: str, prompt: Sequence[int], size: int, tokens: int, seed: int) -> Samples:
    """Answers by the adapter that the server has."""
    options = {"n": size, "max_tokens": tokens, "ignore_eos": True, "seed": seed}
    options |= {"temperature": 1, "logprobs": 1, "return_token_ids": True}
    found = served.post(url, "/v1/completions", model=served.NAME, prompt=list(prompt), **options)
    choices = found["choices"]
    ids = np.array([[*prompt, *x["token_ids"]] for x in choices], np.int32)
    logs = np.array([x["logprobs"]["token_logprobs"] for x in choices], np.float32)
    return Samples(ids, logs, [x["text"] for x in choices])


def reward(text: str) -> float:
    """The share of letters that are an e."""
    letters = [c for c in text.lower() if c.isalpha()]
    return letters.count("e") / max(len(letters), 1)


def log_probs(logits_fn: Any, ids: jax.Array, tokens: int) -> jax.Array:
    """Of the last `tokens` tokens: (B, T)."""
    logs = jax.nn.log_softmax(logits_fn(ids[:, :-1]).astype(jnp.float32))
    found = jnp.take_along_axis(logs, ids[:, 1:, None], -1)[..., 0]
    return found[:, -tokens:]


class Result(NamedTuple):
    """Of each step."""

    rewards: list[float]
    differences: list[float]  # of log-probabilities, the largest of a token
    stale: list[float]  # the same with the adapter of the step before


def main(argv: Sequence[str] | None = None) -> Result:
    """Trains while the server runs."""
    args = parse(argv)
    folder = args.base or smollm2.write(pathlib.Path("out/smollm2"))
    config = llama.read(folder)
    names, tokenizer = llama.names(config), load_tokenizer(folder)
    prompt = tokenizer(PROMPT)["input_ids"]
    variables = peft.load_base(folder, llama.shapes(config), names)
    variables = jax.tree.map(lambda x: x.astype(jnp.float32), variables)
    model = llama.Llama(config, dtype=jnp.float32)
    lora = jlora.transform(model.apply, jlora.LoRA("(query|value|down)/kernel", rank=8))
    base, adapter = lora.init(jax.random.key(0), variables, jnp.array([prompt]))
    tx = jlora.optimizer(optax.adamw(args.rate))

    @jax.jit
    def score(base, adapter, ids):
        return log_probs(Partial(lora.apply, base, adapter), ids, args.tokens)

    @jax.jit
    def step(base, adapter, state, ids, logs, advantages):
        def loss_fn(adapter):
            ours = log_probs(Partial(lora.apply, base, adapter), ids, args.tokens)
            weight = jnp.minimum(jnp.exp(jax.lax.stop_gradient(ours) - logs), MOST)
            return -(weight * advantages[:, None] * ours).mean()

        updates, state = tx.update(jax.grad(loss_fn)(adapter), state, adapter)
        return optax.apply_updates(adapter, updates), state

    folders = args.out.absolute() / "adapters"
    shutil.rmtree(folders, ignore_errors=True)  # of an earlier run
    peft.save(folders / "0", base, adapter, names, profile="vllm")
    os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"  # the server listens to this machine only
    result, state, last = Result([], [], []), tx.init(adapter), adapter
    with served.serve(args.vllm, folder, folders / "0", "--dtype", "float32") as url:
        for i in range(args.steps):
            place = folders / f"{i + 1}"
            peft.save(place, base, adapter, names, profile="vllm")
            new = {"lora_name": served.NAME, "lora_path": str(place), "load_inplace": True}
            served.post(url, "/v1/load_lora_adapter", **new)
            found = sample(url, prompt, args.batch, args.tokens, seed=i)
            rewards = np.array([reward(text) for text in found.texts], np.float32)
            ours = (score(base, x, found.ids) for x in (adapter, last))
            new, old = (float(abs(logs - found.logs).max()) for logs in ours)
            mean = float(rewards.mean())
            print(f"step {i + 1}: reward {mean:.3f}, differences {new:.1e}, {old:.1e} before")
            for values, x in zip(result, (mean, new, old), strict=True):
                values.append(x)
            advantages = (rewards - mean) / (rewards.std() + 1e-4)
            last = adapter
            adapter, state = step(base, adapter, state, found.ids, found.logs, advantages)
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--vllm", required=True, help="the Python of an environment with vLLM")
    add("--base", type=pathlib.Path, help="folder of the model; SmolLM2-135M-Instruct by default")
    add("--out", type=pathlib.Path, default=pathlib.Path("out/serve_rl"))
    add("--steps", type=int, default=8)
    add("--batch", type=int, default=16, help="answers a step")
    add("--tokens", type=int, default=16, help="of an answer")
    add("--rate", type=float, default=3e-3)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
