"""Any causal language model of `transformers`, in PyTorch, as `chat.py` needs it.

    model = causal.load(folder, mesh, "bfloat16", remat=True)
    lora = jlora.transform(model.apply, jlora.LoRA(model.pattern))
    base, adapter = lora.init(key, model.variables, ids)
    log_probs = lora.apply(base, adapter, ids, None, positions, labels=labels)
    texts = model.answer(jax.tree_util.Partial(lora.apply, base, adapter), prompts, [stop])

The class is the one that `config.json` names. Its weights go from the files to the mesh, and its
layers run in a scan where they are equal. The logits are never whole: the model's own head, with
what it does to them, reads a few tokens at a time (`chunked`).
"""

import functools
import inspect
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import chunked
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from accelerate import init_empty_weights
from generation import generate
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial
from progress import progress

import jlora
from jlora import peft
from jlora.extend import Scheme

from .parts import Causal

TEXT = 8  # tokens of each text that `are_apart` packs


def load(
    folder: pathlib.Path, mesh: Mesh, dtype: str, remat: bool, scheme: Scheme | None = None
) -> Causal:
    """The model of a folder, with its weights on the mesh, quantized if there is a scheme.

    Raises:
        ValueError: `config.json` names no class of `transformers`.
        NotImplementedError: the class does what JAX cannot.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    name = next(iter(config.architectures or [""]))
    if not hasattr(transformers, name):
        raise ValueError(f"{folder}: config.json names {name or 'no class'}, not of `transformers`")
    with init_empty_weights():
        model = in_two(getattr(transformers, name))(config).eval()
    model.tie_weights()
    shapes, apply, is_plain = extract(model, mesh, remat)
    run = functools.partial(compute, apply)
    put = functools.partial(place, model.state_dict(), mesh, dtype)
    like = jax.tree_util.tree_map_with_path(put, shapes)
    ids = np.zeros((1, TEXT), np.int32)
    sites = jlora.transform(run).sites(like, ids)
    every = jlora.LoRA(jlora.torch.all_linear(apply, sites), rank=1)
    sites = jlora.transform(run, every).sites(like, ids)
    names = jlora.torch.names(sites, apply)
    experts = {row.path for row in names if row.kind == "experts"}  # vLLM would want them otherwise
    adapted = [site.path for site in sites if site.is_adapted and site.path not in experts]
    places = jax.tree.map(lambda x: x.sharding, like)
    if scheme:
        like = jlora.quantize(like, scheme, sites=sites)
    variables = peft.load_base(folder, like, names)
    hidden = jax.jit(jlora.transform(functools.partial(apply, method="hide")).apply)
    is_cached = is_plain and keeps_cache(functools.partial(run, like), model)
    return Causal(
        run,
        variables,
        places,
        names,
        "|".join(map(re.escape, adapted)),
        are_apart(functools.partial(hidden, variables, {})),
        make_answer(model, folder, is_cached),
        None
        if scheme
        else functools.partial(compare, folder, type(model), dtype, variables, apply),
    )


def in_two(kind: Any) -> Any:
    """The class with two more methods: all but its head, and its head."""

    def hide(self: Any, ids: Any, positions: Any) -> Any:
        """Calls the model without its head."""
        takes = inspect.signature(type(self.base_model).forward).parameters
        given = {"position_ids": positions} if "position_ids" in takes else {}
        return self.base_model(input_ids=ids, use_cache=False, **given).last_hidden_state

    def read(self: Any, hidden: Any) -> Any:
        """Calls the model with the hidden states in the place of all but its head."""
        self.base_model.forward = lambda *_, **__: Outputs(hidden)
        logits = self.forward(inputs_embeds=hidden, use_cache=False).logits
        del self.base_model.forward
        return logits

    return type(kind.__name__, (kind,), {"hide": hide, "read": read, "__module__": kind.__module__})


def compute(apply, variables, ids, segments=None, positions=None, labels=None, **more):
    """The outputs of a model, or with `labels` their log-probabilities."""
    del segments  # a text begins where its positions do
    if labels is None:
        return apply(variables, ids, **{"use_cache": False} | more)
    hidden = apply(variables, ids, positions, method="hide")
    return chunked.log_probs(functools.partial(apply, variables, method="read"), hidden, labels)


def compare(folder, kind, dtype, variables, apply, ids, positions):
    """What differs from the model in PyTorch, which is loaded. Gradients would need more memory."""
    # `transformers` 5.25 would ask for a package of kernels.
    options = {"dtype": getattr(torch, dtype), "use_kernels": False}
    model = kind.from_pretrained(folder, **options).eval()
    takes = inspect.signature(kind.forward).parameters
    given = {"position_ids": jnp.asarray(positions)} if "position_ids" in takes else {}
    options = {"use_cache": False, "gradients": False} | given
    return jlora.torch.compare(model, variables, apply, jnp.asarray(ids), **options)


class Outputs:
    """Hidden states as a model returns them; None for all else that a head asks for."""

    def __init__(self, hidden: Any) -> None:
        """Holds them."""
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Any:
        """The first output."""
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        """There is none."""


def extract(model: Any, mesh: Mesh, remat: bool) -> tuple[Any, Any, bool]:
    """The shapes and the function of a model, in the first way that its layers can take.

    Returns:
        Also whether each layer just runs, and can keep a cache.
    """
    lists = (n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList))
    layers = next(lists).replace(".", "/")
    embed = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    outputs = rf"{embed.replace('.', '/')}|{layers}/\d+"
    rows = {outputs: NamedSharding(mesh, PartitionSpec("fsdp"))}
    again = {"remat": {rf"{layers}/\d+": None}} if remat else {}
    ids, refusals = np.zeros((1, TEXT), np.int32), []
    for options in ({"scan": [layers], **again}, again, {}):
        try:
            shapes, apply = jlora.torch.extract(model, rows, **options)
            jax.eval_shape(functools.partial(apply, method="hide"), shapes, ids, ids)
        except (ValueError, NotImplementedError) as refusal:
            refusals.append(refusal)
        else:
            progress.write(f"{layers}: {', '.join(options) or 'one by one'}")
            return shapes, apply, not options
    raise refusals[-1]


def place(
    tensors: Any, mesh: Mesh, dtype: str, path: Any, x: jax.ShapeDtypeStruct
) -> jax.ShapeDtypeStruct:
    """A shape with a sharding: matrices are cut along outputs, or else inputs; floats: `dtype`."""
    axes: list[str | None] = [None] * x.ndim
    is_vector = tensors[".".join(key.key for key in path)].ndim < 2  # of one layer
    for axis in () if is_vector else (-2, -1):
        if x.shape[axis] % mesh.shape["fsdp"] == 0 and not any(axes):
            axes[axis] = "fsdp"
    dtype = dtype if np.issubdtype(x.dtype, np.inexact) else x.dtype
    return x.update(sharding=NamedSharding(mesh, PartitionSpec(*axes)), dtype=dtype)


def are_apart(hidden: Any) -> bool:
    """Whether texts in a row, whose positions start anew, do not see each other.

    A model with a state sees them, and one that does not read positions.
    """
    positions = np.tile(np.arange(TEXT, dtype=np.int32), 2)[None]
    rows = positions, np.where(np.arange(2 * TEXT) < TEXT, positions[:, ::-1], positions)
    one, other = (np.asarray(hidden(ids, positions)[:, TEXT:]) for ids in rows)
    return bool((one == other).all())


def keeps_cache(call: Any, model: Any) -> bool:
    """Whether a scan over tokens can hold the model's cache; MPT and XGLM read its length."""
    ids = np.ones((1, 1), np.int32)
    try:
        jax.eval_shape(lambda: generate(call, model, ids, ids, new_tokens=2, stop=()))
    except (TypeError, ValueError, NotImplementedError):
        return False
    return True


def make_answer(model: Any, folder: pathlib.Path, is_cached: bool) -> Any:
    """A function that writes after prompts, up to a stop of the tokenizer or of the folder."""
    write = functools.partial(generate, is_cached=is_cached)
    run = jax.jit(
        lambda call, ids, mask, **options: write(call, model, ids, mask, **options),
        static_argnames=("new_tokens", "stop"),
    )

    def answer(
        call: Partial, prompts: Sequence[Sequence[int]], stop: Sequence[int], new_tokens: int = 32
    ) -> list[list[int]]:
        ends = (*stop, *read_stops(folder))
        longest = max(map(len, prompts))
        rows = [np.pad(p, (longest - len(p), 0)) for p in prompts]
        mask = [np.arange(longest) >= longest - len(p) for p in prompts]
        ids, mask = np.array(rows, np.int32), np.array(mask, np.int32)
        found = np.asarray(run(call, ids, mask, new_tokens=new_tokens, stop=ends))
        is_over = np.isin(found, ends).cumsum(1) > 0
        return [row[~over].tolist() for row, over in zip(found, is_over, strict=True)]

    return answer


def read_stops(folder: pathlib.Path) -> Iterator[int]:
    """The tokens that end a text, by `generation_config.json`."""
    if (folder / "generation_config.json").exists():
        found = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
        yield from [] if found is None else np.ravel(found).tolist()
