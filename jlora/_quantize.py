"""`quantize`: stores weights of a base in 4 or 8 bits."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import evaluate_now, is_concrete, place_of
from ._errors import InputError
from ._match import first_matches
from ._quantized import (
    BaseLeaf,
    Form,
    Quantized,
    Scheme,
    check_finite,
    form_of,
    is_quantized,
    quantize_weight,
    spell,
)
from ._rules import explain_no_match, matches, name_mistake, rule_name
from ._site import Full, Site
from ._sites import Sites
from ._tree import check_base, flatten, is_abstract, leaves_by_path, name_of
from ._types import Layout, Path, PyTree
from .sharding._specs import place_codes


def quantize(
    params: PyTree, *schemes: Scheme, sites: Sites | None = None, donate: bool = False
) -> PyTree:
    r"""Quantizes weights to 4 or 8 bits.

    The result is a base: give it to `init`, `apply`, `merge` and the other functions instead of
    `params`. Weights are quantized one after the other, each on its own devices. `quantize` also
    works under `jax.jit`, and turns `jax.ShapeDtypeStruct`s into shapes of codes and scales, which
    keep the sharding of the weight.

    Args:
        params: a tree of arrays; those to be quantized must be floating-point.
        *schemes: `NF4`, `FP4`, `Int8`, `Int4`, `FP8` or `MXFP4`. Each leaf gets the first scheme
            whose pattern matches its path. A scheme without a pattern takes the dense sites that
            are left, except embeddings, the head, and leaves trained in full. (The head is the site
            with as many outputs as the largest embedding has rows.)
        sites: how the model uses each leaf, from `lora.sites(params, ...)`, so that blocks run
            along inputs. By default the last axis of a leaf counts as outputs, the axis before as
            inputs, and all others as a stack.
        donate: whether to delete each array of `params` as soon as it is quantized. Then memory
            holds one more weight, not one more tree.

    Returns:
        A tree like `params`, with `Quantized` leaves. `print(jlora.summary(tree))` shows their
        bytes and errors.

    Raises:
        TypeError: if one of `schemes` is not a scheme, or `params` has an adapter in it.
        ValueError: if a scheme matches nothing, or has no pattern while `sites` is missing; if
            `sites` are of another tree; if a leaf has fewer than two axes, is not floating-point,
            is quantized already, is trained in full, has an axis that the blocks of the scheme must
            divide but do not, is sharded within a block, or has values that are not finite (this is
            not checked under `jit`).

    Source: Dettmers et al., QLoRA, arXiv 2305.14314.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> model = lambda params, x: x @ params["up"] @ params["down"]
        >>> params = {"up": jnp.ones((64, 128)), "down": jnp.ones((128, 2))}
        >>> lora = jlora.transform(model, jlora.LoRA("up", rank=2), jlora.Full("down"))
        >>> x = jnp.ones((1, 64))
        >>> params = jlora.quantize(params, jlora.NF4(), sites=lora.sites(params, x))
        >>> base, adapter = lora.init(jax.random.key(0), params, x)
        >>> float(lora.apply(base, adapter, x)[0, 0]), base["up"].nbytes
        (8192.0, 4232)
    """
    from ._progress import progress  # not at the import of jlora

    for scheme in schemes or (None,):
        if not isinstance(scheme, Scheme):
            raise TypeError(
                "`schemes` must be jlora.NF4, jlora.FP4, jlora.Int8, jlora.Int4, jlora.FP8 or "
                f"jlora.MXFP4; got {name_mistake(scheme, unpack=True)}."
            )
    check_base(params, "params")
    leaves, tree = flatten(params)
    paths = [path for path, _ in leaves_by_path(params)]
    forms = _find_forms(dict(zip(paths, leaves, strict=True)), schemes, sites)
    is_traced = not all(map(is_concrete, jax.tree.leaves(leaves)))
    for i, path in enumerate(progress(paths, "quantize", unit="leaf", disable=is_traced)):
        if path in forms:
            old = leaves[i]
            leaves[i] = _quantize_leaf(leaves[i], path, *forms[path])
            gone = isinstance(old, jax.Array) and is_concrete(leaves[i].data)
            if donate and gone and not any(x is old for x in leaves):
                old.delete()
    return jax.tree.unflatten(tree, leaves)


# ---------------------------------------------------------------------------- which leaves, and how


def _find_forms(
    leaves: dict[Path, Any], schemes: Sequence[Scheme], sites: Sites | None
) -> dict[Path, tuple[Scheme, Form]]:
    """Finds the scheme and the form of each leaf that is to be quantized."""
    found = {} if sites is None else {s.parts: s for s in sites.leaves}
    if sites is not None and found.keys() != leaves.keys():
        [first, *_] = sorted(found.keys() ^ leaves.keys())
        raise InputError(
            "sites",
            f"does not belong to `params`: only one of them has {name_of(first)}. Give "
            "lora.sites(params, ...) of the same tree.",
        )
    rows = max((s.inputs for s in found.values() if s.kind == "embed"), default=0)
    is_match = lambda scheme, path: _is_match(scheme, path, found.get(path), rows)  # noqa: E731
    first = first_matches(schemes, list(leaves), is_match, "schemes")
    for i, scheme in enumerate(schemes):
        if i not in first:
            _raise_idle(scheme, leaves, sites)
    pairs = [(p, schemes[i]) for p, i in zip(leaves, first, strict=True) if i is not None]
    return {p: (scheme, _form(scheme, p, leaves[p], found.get(p))) for p, scheme in pairs}


def _is_match(scheme: Scheme, path: Path, site: Site | None, rows: int) -> bool:
    if scheme.pattern is not None:
        return matches(scheme, "/".join(path))
    if site is None or site.kind != "dense":
        return False
    return site.outputs != rows and not isinstance(site.rule, Full)


def _raise_idle(scheme: Scheme, leaves: dict[Path, Any], sites: Sites | None) -> None:
    name = rule_name(scheme)
    if scheme.pattern is not None:
        advice = explain_no_match(scheme.pattern, ["/".join(path) for path in leaves])
        raise InputError("params", f"has no leaf that {name} matches. {advice}")
    if sites is None:
        raise ValueError(
            f"{name} has no pattern, so it matches every dense site except the head. Give "
            "`sites=lora.sites(params, ...)`, which lists the dense sites, or a pattern."
        )
    raise InputError(
        "sites",
        f"has no site for {name}, which takes every dense site except the head and leaves trained "
        "in full. Name leaves by a pattern.",
    )


def _form(scheme: Scheme, path: Path, x: BaseLeaf, site: Site | None) -> Form:
    name = f"{rule_name(scheme)} matches {name_of(path)!r}"
    if is_quantized(x):
        raise ValueError(
            f"{name}, which is quantized already, as {spell(x.scheme)}. Narrow the pattern, or "
            "give jlora.dequantize(params)."
        )
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise ValueError(
            f"{name} of dtype {jnp.result_type(x)}, which is not floating-point. Narrow the "
            "pattern."
        )
    shape = tuple(jnp.shape(x))
    if len(shape) < 2 or 0 in shape:
        raise ValueError(f"{name} of shape {shape}, which is not a matrix. Narrow the pattern.")
    if site is not None and isinstance(site.rule, Full):
        raise ValueError(
            f"{name}, which {rule_name(site.rule)} trains in full: trained leaves must not be "
            f"quantized. Give {type(scheme).__name__} a pattern that leaves it out."
        )
    if site is not None and site.kind is not None:
        layout, kind = site.layout, site.kind
    else:
        kind = None
        *stack, i, o = range(len(shape))
        layout = Layout(tuple(stack), (i,), (o,))
    try:
        return form_of(scheme, shape, layout, kind)
    except ValueError as e:
        raise ValueError(f"{name}. {e}") from None


# ------------------------------------------------------------------------------------------- work


def _quantize_leaf(x: BaseLeaf, path: Path, scheme: Scheme, form: Form) -> Quantized:
    scheme = dataclasses.replace(scheme, pattern=None)
    if is_abstract(x):
        leaf = jax.eval_shape(lambda x: quantize_weight(x, scheme, form), x)
        return place_codes(path, leaf, x.sharding, "params")
    x = evaluate_now(jnp.asarray, x) if isinstance(x, np.ndarray) else x
    check_finite(x, "params", name_of(path), f"{type(scheme).__name__} has no codes for")
    leaf = quantize_weight(jnp.asarray(x), scheme, form)
    return place_codes(path, leaf, place_of(x) if is_concrete(leaf.data) else None, "params")
