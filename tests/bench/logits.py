"""A loss whose logits are never whole, beside one whose are: peak memory and operations.

    python -m tests.bench logits

Llama 3 8B's shapes, 2 × 4,096 tokens in bfloat16, all-linear adapters of rank 16, each layer
computed again. The peak is that of two layers, by the compilers for an H100 and for a v5e; the
operations are those of products in all 32. The attention is left out: a flash attention takes
little memory, and others have tests of their own.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import chunked
import jax
import jax.numpy as jnp
import optax
import pod_plan
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jlora
from jlora._compat import HURRIED
from jlora._progress import progress

from . import h100, report, tpu
from .peers import llama_work

WORK = llama_work.LLAMA
HEADS = {"frozen": h100.PROJECTIONS, "adapted": f"{h100.PROJECTIONS}|head"}
# The most operations over those with whole logits: an adapted head's logits are computed again.
LIMITS = {"frozen": 1.0, "adapted": 1.027}


def whole(head: Any, hidden: jax.Array, labels: jax.Array) -> jax.Array:
    """What `chunked.log_probs` gives, with all logits."""
    logits = head(hidden).astype(jnp.float32)
    return -optax.softmax_cross_entropy_with_integer_labels(logits, labels)


FORMS = {"whole": whole, "in chunks": chunked.log_probs}


class Cost(NamedTuple):
    """Of a step.

    Attributes:
        peak: bytes of a step with two layers.
        flops: operations of products in a step with all layers.
        has_logits: whether the compiled program has an array of all logits.
    """

    peak: int
    flops: float
    has_logits: bool


def run(quick: bool) -> None:
    """A row for each compiler, head and form."""
    report.table("logits: whole and in chunks", list(rows(quick)))


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """In GB and TFLOPs."""
    for chip in progress(("v5e",) if quick else ("v5e", "H100"), "logits"):
        for trained in HEADS:
            for form in FORMS:
                cost = step(chip, trained, form)
                numbers = {"peak GB": cost.peak / 1e9, "TFLOPs": cost.flops / 1e12}
                yield {"device": chip, "head": trained, "logits": form, **numbers}


def step(chip: str, trained: str, form: str) -> Cost:
    """The cost of a step on a chip, whose head is `trained` and whose logits have this form.

    The TPU's compiler is in a hurry, which changes the peak by 1%.
    """
    if chip == "v5e":
        mesh, options = tpu.mesh_for("v5e:2x2", (1, 1)), HURRIED
    else:
        mesh, options = pod_plan.mesh_of("cuda:1x1x1", (1, 1)), None
    found = jlora.plan(*job(2, mesh, trained, form), compiler_options=options)
    loss, base, adapter, args, _ = job(WORK.layers, mesh, trained, form)
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(adapter, base, *args)
    assert found.peak is not None and found.program is not None
    return Cost(found.peak, pod_plan.flops(jaxpr), has_logits(found.program.as_text()))


def check(chip: str, trained: str) -> None:
    """Asserts what chunks promise: no array of all logits, a lower peak, operations alike."""
    whole, ours = (step(chip, trained, form) for form in FORMS)
    assert whole.has_logits and not ours.has_logits
    assert ours.peak <= whole.peak - 3.5e9
    assert ours.flops <= LIMITS[trained] * whole.flops


def has_logits(program: str) -> bool:
    """Whether a program has an array of as many elements as there are logits."""
    found = re.findall(r"\[([\d,]+)\]", program)
    return max(math.prod(map(int, shape.split(","))) for shape in found) >= WORK.tokens * WORK.vocab


def job(layers: int, mesh: Mesh, trained: str, form: str) -> tuple[Any, ...]:
    """What `jlora.plan` takes."""

    def place(tree: Any) -> Any:
        everywhere = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree
        )

    work = WORK._replace(layers=layers)
    shape = h100.shape_of(work)._replace(remat=True, attention=no_attention)
    model = functools.partial(h100.model, shape, log_probs=FORMS[form])
    rule = jlora.LoRA(HEADS[trained], rank=llama_work.RANK, dtype=jnp.float32)
    lora = jlora.transform(model, rule)
    key, ids = jax.random.key(0), jax.ShapeDtypeStruct((work.batch, work.length + 1), jnp.int32)
    params = jax.eval_shape(functools.partial(h100.start, work), key)
    _, adapter = jax.eval_shape(lora.init, key, params, ids)

    def loss(adapter: Any, base: Any, ids: jax.Array) -> jax.Array:
        return -lora.apply(base, adapter, ids).mean()

    return loss, place(params), place(adapter), (place(ids),), optax.adamw(1e-4)


def no_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """As large as one, of all three."""
    return q + jnp.repeat(k + v, q.shape[2] // k.shape[2], axis=2)
