"""Sketches of real models: MiniLM on film reviews, SmolLM2 as its file has it, in 4 and 8 bits."""

from typing import Any

import data
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import bert, llama
from paper.tasks import encoding
from quickstart import encode

import jlora
from jlora import LoRA
from jlora.initializers import eva

LAYERS, RULE = 6, LoRA(r"encoder/.*kernel", rank=4)


@pytest.fixture(scope="module")
def sentences() -> list[Any]:
    """Two batches of reviews of many lengths, filled up to one."""
    tokenizer = encoding.load_tokenizer(data.minilm())
    batch = encode(tokenizer, data.movie_snippets()[0][:16], 24)
    return [jax.tree.map(lambda x, i=i: x[i : i + 8], batch) for i in (0, 8)]


def of_minilm(scan: bool) -> tuple[Any, Any, Any]:
    """The model, its variables, and a loss of its mean over the tokens under the mask."""
    config, variables = bert.load(data.minilm(), scan=scan)
    model = bert.Bert(config, scan=scan, remat=scan)

    def loss(variables: Any, batch: Any) -> jax.Array:
        x = bert.pool(model.apply(variables, batch.ids, batch.mask), batch.mask)
        return jnp.sum(jnp.sin(7 * x))

    return model, variables, loss


def inputs_of(model: Any, variables: Any, batches: list[Any]) -> dict[str, np.ndarray]:
    """What each dense layer is called with under the mask, as Flax tells it, less its mean."""
    found: dict[str, list[Any]] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            found.setdefault("/".join(context.module.path), []).append(args[0][mask])
        return call(*args, **kwargs)

    for batch in batches:
        mask = np.asarray(batch.mask) > 0
        with nn.intercept_methods(record):
            model.apply(variables, batch.ids, batch.mask)
    inputs = {path: np.concatenate(xs).astype(np.float64) for path, xs in found.items()}
    return {path: z - z.mean(0) for path, z in inputs.items()}


def check(s: jlora.types.Spectrum, i: Any, z: np.ndarray) -> None:
    """The leading components, and what they hold of all."""
    values = np.linalg.svd(z, compute_uv=False)
    a, k = np.asarray(s.inputs[i]), s.values.shape[-1]
    np.testing.assert_allclose(s.values[i][: k // 2], values[: k // 2], rtol=1e-2)
    assert np.linalg.norm(z @ a) ** 2 >= 0.98 * np.sum(values[:k] ** 2)
    np.testing.assert_allclose(s.total[i], np.sum(values**2), rtol=0.1)


@pytest.mark.slow
def test_inputs_of_minilm_in_a_loop(sentences: list[Any]) -> None:
    """Padding has inputs too, which do not count, in any of the rematerialized layers."""
    _, variables, loss = of_minilm(scan=True)
    found = jlora.sketch(loss, variables, RULE, sentences, kind="inputs")
    model, variables, _ = of_minilm(scan=False)
    expected = inputs_of(model, variables, sentences)
    assert len(found.sites) == 6
    for path, s in found.sites.items():
        for i in range(LAYERS):
            name = path.removeprefix("params/").removesuffix("/kernel")
            check(s, i, expected[name.replace("encoder/layer/", f"encoder/layer_{i}/")])


@pytest.mark.slow
def test_ranks_and_gradient_of_minilm(sentences: list[Any]) -> None:
    """The captured gradient is that of the dense one; the rules train what they say."""
    model, variables, loss = of_minilm(scan=False)
    found = jlora.sketch(loss, variables, RULE, sentences, kind="gradient")
    mean = lambda v: sum(loss(v, batch) for batch in sentences) / 2  # noqa: E731
    gradients = jax.jit(jax.grad(mean, allow_int=True))(variables)
    by_path = {"/".join(p): x for p, x in jlora._tree.leaves_by_path(gradients)}
    for path, s in found.sites.items():
        g = np.asarray(by_path[path], np.float64)
        values = np.linalg.svd(g, compute_uv=False)
        np.testing.assert_allclose(s.values[:4], values[:4], rtol=2e-2)
        np.testing.assert_allclose(s.total, np.sum(values**2), rtol=0.1)
    allocation = jlora.allocate(found, RULE, budget=50_000)
    assert 48_000 < sum(allocation.parameters.values()) <= 50_000
    lora = jlora.transform(model.apply, *allocation)
    ids = sentences[0].ids
    sites = lora.sites(variables, ids)
    ranks = {s.path: s.rule.rank for s in sites if s.rule is not None}
    assert ranks == {path: r for path, r in allocation.ranks.items() if r}


@pytest.mark.slow
def test_smollm2_starts_as_it_was() -> None:
    """On its packed base, of scanned layers."""
    config, variables, tokenizer = llama.load_gguf(data.smollm2(), packed=True)
    model = llama.Llama(config)
    ids = jnp.asarray([tokenizer.encode("The quick brown fox jumps over the lazy dog.").ids])

    def loss(variables: Any, ids: jax.Array) -> jax.Array:
        logits = jax.nn.log_softmax(model.apply(variables, ids[:, :-1]).astype(jnp.float32))
        return -jnp.take_along_axis(logits, ids[:, 1:, None], -1).mean()

    rule = LoRA(r"attention/(query|value)/kernel", rank=2)
    for kind in ("inputs", "gradient"):
        found = jlora.sketch(loss, variables, rule, [ids], kind=kind, passes=2)
        assert {s.values.shape for s in found.sites.values()} == {(config.layers, 4)}
        assert all(np.all(np.asarray(s.values) > 0) for s in found.sites.values())
        if kind == "inputs":
            rule = LoRA(rule.pattern, rank=2, init=eva(found))
            lora = jlora.transform(model.apply, rule)
            base, adapter = lora.init(jax.random.key(0), variables, ids)
            y, expected = (lora.apply(base, x, ids) for x in (adapter, {}))
            np.testing.assert_allclose(y, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
