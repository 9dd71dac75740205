"""`examples/paper/methods`: laws of every method over BERT, RoBERTa and GPT-2."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import bert, gpt, parts
from paper.methods import METHODS, PREFIXES
from small import some_rows

import jlora

L, D, VOCAB = 2, 16, 50
_SIZES = (VOCAB, D, L, 2, 32, 40)
MODELS = {
    "bert": bert.Bert(bert.Config(*_SIZES, 2, 1e-12), classes=2),
    "roberta": bert.Bert(bert.Config(*_SIZES, 1, 1e-5, "roberta", 1, head="cls"), classes=2),
    "gpt": gpt.GPT(gpt.Config(VOCAB, 40, L, D, 2), scan=False),
}
SIZES = {
    "lora": {"rank": 2},
    "lora_all": {"rank": 2},
    "adapter_h": {"bottleneck": 6},
    "adapter_l": {"bottleneck": 3},
    "pre_embed": {"l_p": 5},
    "pre_layer": {"l_p": 5},
    "prompt": {"l_p": 4},
}
IDS = np.random.default_rng(0).integers(8, VOCAB, (3, 7))
MASK = (np.arange(7) < np.array([7, 5, 3])[:, None]).astype(np.int32)
IDS[MASK == 0] = 1  # RoBERTa's padding

EVERY = [*itertools.product(("bert", "gpt"), METHODS)]
EVERY += [("roberta", "adapter_h"), ("roberta", "pre_layer")]


@functools.cache
def variables(kind):
    """Weights of a size that lets every part count, none of them at a constant."""

    def middle(path, x):
        return np.full(x.shape, "scale" in jax.tree_util.keystr(path), np.float32)

    return jiggle(jax.tree_util.tree_map_with_path(middle, parts.shapes(MODELS[kind])), 0.2)


def jiggle(tree, by):
    """A tree near by; the noise of a leaf is its own."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(x + by * rng.standard_normal(x.shape), jnp.float32), tree
    )


@pytest.mark.parametrize(("kind", "name"), some_rows(EVERY))
def test_laws(kind, name):
    """Frozen variables, a start at the model, gradients everywhere, and padding that is unseen."""
    rules = () if kind == "gpt" else (jlora.Full("pooler|classifier"),)
    method, params = METHODS[name](MODELS[kind], *rules, **SIZES.get(name, {})), variables(kind)
    base, trained = method.init(jax.random.key(2), params, IDS, MASK)
    kept = {k: tree for k, tree in base.items() if k != "added"}
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y, kept, params))
    mask = jlora.mask(jlora.Params(base, trained))
    assert not any(jax.tree.leaves(mask.base)) and all(jax.tree.leaves(mask.adapter))

    @jax.jit
    def run(trained, ids):
        def loss(trained):
            outputs = method.apply(base, trained, ids, MASK)
            return (outputs[0] ** 2).mean(), outputs

        return jax.grad(loss, has_aux=True)(trained)

    _, outputs = run(trained, IDS)
    off = np.abs(outputs - jax.jit(MODELS[kind].apply)(params, IDS, MASK))[0].max()
    assert off > 1e-2 if name in PREFIXES else off < 1e-5
    trained = jiggle(trained, 0.3)
    grads, outputs = run(trained, IDS)
    paths = jax.tree_util.tree_leaves_with_path(grads)
    assert [jax.tree_util.keystr(p) for p, g in paths if not np.abs(g).max() > 0] == []
    _, other = run(trained, np.where(MASK > 0, IDS, 20))
    real = MASK > 0 if kind == "gpt" else slice(None)
    np.testing.assert_allclose(outputs[real], other[real], atol=1e-5)
