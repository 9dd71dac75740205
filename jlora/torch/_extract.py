"""A module of PyTorch as parameters and a function, which is what `jlora.transform` takes."""

from collections.abc import Callable, Collection, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

from .._tree import nest
from .._types import PyTree

if TYPE_CHECKING:
    import torch  # pyright: ignore[reportMissingImports]
    from jax.sharding import NamedSharding, PartitionSpec

    from ._apply import Apply


def extract(
    model: "torch.nn.Module",  # pyright: ignore[reportAttributeAccessIssue]
    activations: "Mapping[str, PartitionSpec | NamedSharding] | None" = None,
    scan: "Collection[str]" = (),
    remat: "Mapping[str, Callable[..., bool] | None] | None" = None,
) -> "tuple[PyTree, Apply]":
    r"""Makes parameters and a function of JAX from a module of PyTorch, by torchax.

    $$\mathrm{apply}(params, x) = \mathrm{model}(x)$$

    Examples:
        >>> import jax, jax.numpy as jnp, jlora, torch  # doctest: +SKIP
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())  # doctest: +SKIP
        >>> params, apply = jlora.torch.extract(net.eval())  # doctest: +SKIP
        >>> lora = jlora.transform(apply, jlora.LoRA("0/weight", rank=2))  # doctest: +SKIP
        >>> x = jnp.ones((1, 4))  # doctest: +SKIP
        >>> base, adapter = lora.init(jax.random.key(0), params, x)  # doctest: +SKIP
        >>> lora.apply(base, adapter, x).shape  # doctest: +SKIP
        (1, 8)

    Args:
        model: a module in evaluation mode. It does not change. On PyTorch's meta device, leaves are
            `jax.ShapeDtypeStruct`s.
        activations: shardings of the outputs of modules; of several outputs, of the first. A key is
            a pattern for the last components of a module's name, such as `r"layers/\d+/mlp"`.
            Without them, XLA may spread the shardings of A and B into the activations.
        scan: lists of equal layers, such as `("model/layers",)`. One `jax.lax.scan` runs them, so
            that compilation does not take longer with more layers. Their parameters are stacked
            along a first axis, at the path of the first layer. Where several kinds of layers
            repeat, such as five with windows and one without, a step of the scan has all of them.
            Layers before and after those that repeat run as they are.
        remat: what is computed again in the backward pass, to save memory: by patterns of modules,
            as in `activations`, the policy of `jax.checkpoint`, such as `jlora.remat_policy`.

    Returns:
        The parameters and `apply(params, *args, method="forward", **kwargs)`.

        The parameters are a nested dict. `model.layers.0.mlp.weight` has the path
        `model/layers/0/mlp/weight`. A tensor that several modules share is one leaf, at the path of
        the first. Buffers that are saved with the model, such as the statistics of a batch
        normalization, are leaves too. They stay frozen: no rule takes them. Other buffers are
        constants of `apply`.

        `apply` calls the method of this name:

        - Arrays of JAX are traced. Other values, such as `use_cache=False`, are static: bind them
          by `functools.partial`. Tensors of PyTorch and arrays of integers or booleans of NumPy are
          static too, and the model may read their values. Give them not to `jax.jit` and the like,
          which trace arrays of NumPy.
        - Outputs are arrays in the model's own dict or dataclass, which is registered as a pytree
          when it is first returned. Caches of `transformers` are pytrees too, in and out: a call
          returns a new one, and the one that it was given stays. A layer in `scan` takes none.
        - Gradients stop where PyTorch stops them: at `no_grad`, `inference_mode`, `detach` and
          `.data`. A weight that is read only there is no site. Grad mode around the call of
          `apply` changes nothing.
        - The `backward` of a torch.autograd.Function is the rule of a `jax.custom_vjp`.
        - Gradients are PyTorch's at kinks and at zero too, as of `clamp`, `abs`, `max` and `norm`.
          A row at `padding_idx` of an embedding gets none.
        - Writes in place are seen in views, and in what they are views of.
        - The softmax of `scaled_dot_product_attention` is in float32, but of float64 in float64.

    Raises:
        ImportError: if PyTorch or torchax is not installed, or the two do not fit.
        TypeError: if `model` is not a module; later, if an output is no pytree of arrays, or the
            model reads values that are traced.
        ValueError: if `model` is in training mode, or has attributes computed from its parameters,
            or hooks on gradients, or gradient checkpointing; if a pattern matches no module; if
            layers in `scan` do not repeat; if a buffer on the meta device cannot be computed, or
            has integers that need jax_enable_x64.
        NotImplementedError: later, with the module and its line, if the model draws random
            numbers, runs under `torch.autocast`, asks PyTorch for gradients, calls an operator that
            torchax does not have, or writes into a tensor that `torch.zeros` and the like made; if
            it changes a buffer or an attribute so that its next call would compute something else;
            if it does anything with what a layer in `scan` returns but hand it to the next layer.
            When it is differentiated, if it calls a torch.autograd.Function that keeps tensors for
            its `backward` beside those of `save_for_backward`.
    """
    try:
        from ._apply import Apply
        from ._skeleton import check_module, find_saved, to_jax, warn_of_rounding
        from ._stacks import find_stack, stack_arrays
    except ModuleNotFoundError as e:
        raise ImportError(
            f"jlora.torch.extract needs PyTorch and torchax, but {e.name!r} is not installed: "
            "pip install 'jlora[torch]'."
        ) from e
    except AttributeError as e:
        versions = [f"{name} {version(name)}" for name in ("torchax", "torch")]
        raise ImportError(
            f"jlora.torch.extract needs torchax, and {' does not import with '.join(versions)} "
            f"({e}). Install a version of PyTorch that it knows: pip install 'jlora[torch]'."
        ) from e
    check_module(model)
    if remat is not None and not isinstance(remat, Mapping):
        why = f"must be a dict from patterns of modules to policies; got {type(remat).__name__}."
        raise TypeError(f"`remat` {why} For no policy write {{pattern: None}}.")
    saved = find_saved(model)
    warn_of_rounding(saved)
    stacks = [find_stack(model, path) for path in scan]
    arrays = {name: to_jax(x, name) for name, x in saved.items()}
    leaves = {tuple(n.split(".")): x for n, x in stack_arrays(arrays, stacks).items()}
    return nest(leaves), Apply(model, activations, stacks, remat or {})
