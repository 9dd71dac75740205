"""What the methods share: the pair of functions that each is, and parameters added to a model.

A method that adds parameters is a function of more variables than the model's, those of a
collection ``"added"``, with a rule that trains that collection in full. They act where Flax lets
one step between a module and its call, so that the models know nothing of them.

Letters in the shapes: B batch, L tokens, D hidden size.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from models import bert, gpt

import jlora

Rule = jlora.LoRA | jlora.Full
# (call, layer, part, *inputs) to what `call(*inputs)` gives, changed; see `change`.
Hook = Callable[..., Any]

_PLACE = re.compile(r"(?:encoder/layer|h)_(\d+)(?:/(\w+))?")
_PARTS = {None: "layer", "attention": "attention", "attn": "attention", "down": "mlp", "mlp": "mlp"}


class Method(NamedTuple):
    """A way to fine-tune a model, as two pure functions and their rules.

    Attributes:
        init: `(key, variables, *args, **kwargs) -> (base, trained)`; arguments after the variables
            are the model's own, arrays or `jax.ShapeDtypeStruct`s, and only traced. `base` is the
            variables, and for some methods a collection ``"added"``; `trained` is a nested dict
            of what is trained.
        apply: `(base, trained, *args, **kwargs) -> outputs of the model`.
        rules: what `trained` is of `base`, for `jlora.checkpoint`.
    """

    init: Callable[..., tuple[Any, Any]]
    apply: Callable[..., Any]
    rules: tuple[Rule, ...]


class Sizes(NamedTuple):
    """What a method needs to know of a model."""

    layers: int
    dim: int
    vocab: int


def sizes(model: nn.Module) -> Sizes:
    """The sizes of a BERT or GPT-2 whose layers are modules of their own.

    Raises:
        TypeError: if it is another model.
        ValueError: if its layers are scanned.
    """
    match model:
        case bert.Bert():
            c = model.config
            found = Sizes(c.num_hidden_layers, c.hidden_size, c.vocab_size)
        case gpt.GPT():
            c = model.config
            found = Sizes(c.layers, c.dim, c.vocab)
        case _:
            raise TypeError(
                f"`model` must be a bert.Bert or gpt.GPT; got a {type(model).__name__}."
            )
    if model.scan:
        raise ValueError(
            "`model` must have layers that are modules of their own, for this method adds to each; "
            "got scan=True. Load the variables and build the model with scan=False."
        )
    return found


def with_rules(model: nn.Module, *rules: Rule) -> Method:
    """What the rules train of the model, and nothing else."""
    lora = jlora.transform(model.apply, *rules)
    return Method(lora.init, lora.apply, rules)


def with_added(
    model: nn.Module,
    draw: Callable[[jax.Array, Any], Any],
    begin: Callable[..., Hook],
    *rules: Rule,
) -> Method:
    """The model with added parameters, which are trained with what the rules train.

    Args:
        model: a BERT or GPT-2.
        draw: the added parameters, from a key and the model's variables.
        begin: see `change`.
        *rules: of `jlora.transform`.
    """
    rules = jlora.Full("^added"), *rules
    adapted = jlora.transform(change(model.apply, begin), *rules)

    def init(key: jax.Array, variables: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        key, own = jax.random.split(key)
        variables = {**variables, "added": draw(own, variables)}
        return adapted.init(key, variables, *args, **kwargs)

    return Method(init, adapted.apply, rules)


def change(apply: Callable[..., Any], begin: Callable[..., Hook]) -> Callable[..., Any]:
    """`apply`, of variables with a collection ``"added"``, whose layers `begin` changes.

    Args:
        apply: of a BERT or GPT-2.
        begin: gives the hook of a call from the added parameters and the call's arguments. The
            hook stands for every layer and its parts: `hook(call, layer, part, *inputs)` is what
            they give instead of `call(*inputs)`. `layer` is a number; `part` is ``"layer"``, with
            inputs x ``(B, L, D)``, mask and what it has of a cache, and outputs ``(x, None)``, or
            ``"attention"`` or ``"mlp"``, whose output is what the layer adds to its residual.
            GPT-2's layer and attention give what the cache then holds in the place of None.
    """

    def changed(variables: Any, /, *args: Any, **kwargs: Any) -> Any:
        rest = {name: tree for name, tree in variables.items() if name != "added"}
        hook = begin(variables["added"], *args, **kwargs)

        def intercept(call, inputs, options, context):
            place = _PLACE.fullmatch("/".join(context.module.path))
            if place is None or context.method_name != "__call__" or place[2] not in _PARTS:
                return call(*inputs, **options)
            return hook(call, int(place[1]), _PARTS[place[2]], *inputs)

        with nn.intercept_methods(intercept):
            return apply(rest, *args, **kwargs)

    return changed
