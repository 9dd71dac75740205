"""What of the adapted sites PEFT's files cannot hold, before training."""

from collections.abc import Sequence

import jax

from .._errors import Problem
from .._site import Full, Site
from .._tree import nest
from .adapter._writable import Use, list_unheld, name_leaves
from .names._by_value import HasSites
from .names._names import Name


def check_sites(sites: HasSites, names: Sequence[Name]) -> tuple[Problem, ...]:
    r"""Finds what of the adapted sites no file of PEFT can hold, before training.

    `save` and `tensors` refuse the same leaves, in the same words, and also values that no file can
    hold, such as those that are not finite.

    Args:
        sites: `jlora.transform(apply_fn, *rules).sites(params, …)`.
        names: a table of `Name` rows, of `jlora.peft.TABLES` or `jlora.torch.names`.

    Returns:
        A problem for each leaf: its path, the reason, and what to do. None if PEFT has a form for
        all.

    Raises:
        TypeError: if `names` is not a table.
        ValueError: if two leaves have the same name.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> from jlora import peft
        >>> def f(p, x):
        ...     return x @ p["up"] @ p["down"]
        >>> names = [peft.Name("up", "up", "io")]
        >>> params = {"up": jnp.ones((4, 3)), "down": jnp.ones((3, 4))}
        >>> sites = jlora.transform(f, jlora.LoRA(rank=2)).sites(params, jnp.ones((1, 4)))
        >>> for problem in peft.check_sites(sites, names):
        ...     print(problem.where, "|", problem.why)
        down | no row of `names` fits 'down' with 2 axes
    """
    shapes = {site.parts: jax.ShapeDtypeStruct(site.shape, site.dtype) for site in sites.leaves}
    leaves = name_leaves(nest(shapes), names, for_peft=True)
    uses = {site.parts: _use(site) for site in sites.leaves if site.is_trained}
    return tuple(list_unheld(uses, leaves, names))


def _use(site: Site) -> Use:
    node = None if site.rule is None or isinstance(site.rule, Full) else site.rule.node
    return Use(node, site.layout, site.shape)
