"""`sketch`, and its loop over batches."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from .._adapters import LoRA, is_node
from .._errors import InputError
from .._keys import check_key, fold
from .._rules import check_int
from .._site import Rule, Site, check_rules
from .._transform import transform, wrap
from .._tree import bind, leaves_by_path, nest
from .._types import Path, PyTree, short
from ._kinds import KINDS, Gradient, Inputs, Sketch, Spectrum


def sketch(
    loss: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    rules: Rule | Sequence[Rule],
    batches: Iterable[Any],
    *,
    kind: str,
    components: int | None = None,
    passes: int = 4,
    key: jax.Array | None = None,
) -> Sketch:
    r"""Computes the leading singular vectors of each site's inputs, or of its gradient.

    With `kind="gradient"` they are the singular vectors of $G = \partial L / \partial W$, where L
    is the mean loss over all batches. With `kind="inputs"` they are the principal components of the
    inputs z of the site, the singular vectors of all $z - \bar z$. An input counts only if the loss
    depends on its product with W, so padding and masked inputs do not count.

    Each batch costs the time and memory of a training step of a LoRA of rank `components` + 16. No
    gradient of W's size is formed. The parameters may be quantized and sharded.

    Args:
        loss: the training loss without an adapter, a function of parameters and a batch that
            returns a scalar.
        params: the parameters, as for `init`.
        rules: one rule, or several as for `transform`. The sites of `LoRA` and `DoRA` are sketched.
        batches: a list, or another iterable that can be read several times. Batches of one shape
            share a program.
        kind: `"inputs"` or `"gradient"`.
        components: the number of singular vectors; by default twice the rank of the rule. A site
            that has fewer gets all of them.
        passes: how often to read the batches, at least twice; more passes are more exact.
        key: a PRNG key for the random first basis; by default `jax.random.key(0)`.

    Returns:
        A `Sketch`, for `initializers.eva`, `initializers.lora_ga` and `allocate`.

    Raises:
        TypeError: if an argument has the wrong type, or `batches` can be read only once.
        ValueError: if a number is out of range, a rule does not fit the model, a site has no inputs
            to sketch, or a result is not finite, or all results are zero.
        NotImplementedError: if the inputs of a site cannot be observed, for example because a
            `shard_map` of the model shards its matrices.

    Source: Paischer et al., EVA, arXiv 2410.07170; Wang et al., LoRA-GA, arXiv 2407.05000; Halko
    et al., arXiv 0909.4061, for the iteration.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> params = {"w": jnp.diag(jnp.array([3.0, 2.0, 1.0, 0.0]))}
        >>> loss = lambda params, x: jnp.sum((x @ params["w"]) ** 2) / 2
        >>> batches = [jnp.eye(4)[:2], jnp.eye(4)[2:]]
        >>> print(jlora.sketch(loss, params, jlora.LoRA("w", rank=1), batches, kind="gradient"))
        site  matrices  inputs  outputs  components  largest  share
        ───────────────────────────────────────────────────────────
        w            1       4        4           2      1.5  92.9%
    """
    key = jax.random.key(0) if key is None else key
    _check(kind, components, passes, key, batches)
    first = next(iter(batches), None)
    if first is None:
        raise InputError("batches", "is empty; at least one batch is needed.")
    leaves = transform(loss, *check_rules(rules)).sites(params, first).leaves
    sites = [s for s in leaves if isinstance(s.rule, LoRA)]
    if not sites:
        raise InputError("rules", "must have a jlora.LoRA or jlora.DoRA that matches a site.")
    if kind == "inputs":
        _check_inputs(sites)
    found = {s.parts: KINDS[kind].of(s, components) for s in sites}
    sides = list(itertools.islice(itertools.cycle(KINDS[kind].sides), passes))
    spectra = _iterate(loss, params, found, batches, sides, key)
    _check_found(spectra, kind)
    return Sketch(spectra, kind)


def _iterate(
    loss: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    sites: Mapping[Path, Inputs | Gradient],
    batches: Iterable[Any],
    sides: Sequence[int],
    key: jax.Array,
) -> dict[str, Spectrum]:
    """Reads the batches once for each side; returns the spectrum of each site by path."""
    from .._progress import progress  # not at the import of jlora

    @jax.jit
    def gradient(params: PyTree, adapter: PyTree, batch: PyTree) -> PyTree:
        def value(adapter: PyTree) -> jax.Array:
            y = wrap(loss)(bind(params, adapter), batch)
            if getattr(y, "shape", None) != ():
                raise TypeError(f"`loss` must return a scalar; got {short(y)}.")
            return y

        return jax.grad(value)(adapter)

    add = jax.jit(lambda x, y: jax.tree.map(jnp.add, x, y))
    keys = {path: fold(key, path) for path in sites}
    bases: dict[Path, jax.Array] = {}
    images: dict[Path, jax.Array | None] = dict.fromkeys(sites)
    total = len(sides) * len(batches) if isinstance(batches, Sized) else None
    with progress(total=total, desc="sketch", leave=False) as bar:
        for turn, side in enumerate(sides):
            is_last = turn == len(sides) - 1
            bases = {p: s.basis(side, is_last, images[p], keys[p]) for p, s in sites.items()}
            adapter = nest({p: s.node(side, bases[p], keys[p]) for p, s in sites.items()})
            sums, count = None, 0
            for batch in batches:
                new = gradient(params, adapter, batch)
                sums = new if sums is None else add(sums, new)
                count += 1
                bar.update()
            if sums is None:
                raise TypeError(_ONCE)
            nodes = dict(leaves_by_path(jax.tree.map(_replicate, sums), is_node))
            images = {p: s.image(side, bases[p], nodes[p], count) for p, s in sites.items()}
    return {"/".join(p): s.spectrum(sides[-1], bases[p], images[p]) for p, s in sites.items()}


def _replicate(x: jax.Array) -> jax.Array:
    """Copies `x` to all devices of its mesh."""
    if not isinstance(x.sharding, NamedSharding):
        return x
    return jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))


# ---------------------------------------------------------------------------------------- refusals

_ONCE = (
    "`batches` must be a list or another iterable that can be read several times, as there are "
    "several passes; got an iterator, which ends after one. Give list(batches)."
)


def _check(
    kind: object, components: object, passes: object, key: jax.Array, batches: Iterable[Any]
) -> None:
    if kind not in KINDS:
        raise InputError("kind", f"must be {' or '.join(map(repr, KINDS))}; got {kind!r}.")
    if components is not None:
        check_int("components", components, 1)
    check_int("passes", passes, 2)
    check_key(key)
    if iter(batches) is batches:
        raise TypeError(_ONCE)


def _check_inputs(sites: Sequence[Site]) -> None:
    for site in (s for s in sites if s.kind not in ("dense", "conv")):
        why = "row numbers are looked up" if site.kind == "embed" else "W + ΔW is formed there"
        raise InputError(
            "kind",
            f"is 'inputs', but {site.name} has no inputs: {why}. Leave it out of the rules, "
            "or sketch its gradient.",
        )


def _check_found(spectra: Mapping[str, Spectrum], kind: str) -> None:
    totals = {path: np.asarray(s.total) for path, s in spectra.items()}
    for path, total in totals.items():
        if not np.isfinite(total).all() or not np.isfinite(spectra[path].values).all():
            raise ValueError(
                f"the sketch of the {kind} of {path!r} is not finite. Look for NaN and infinity in "
                "`params`, `batches` and the loss."
            )
    if not any(total.any() for total in totals.values()):
        zero = "is zero" if kind == "gradient" else "are all equal, or the loss depends on none"
        raise ValueError(
            f"there is nothing to sketch: the {kind} of every site {zero}. Give the loss and the "
            "batches of training."
        )
