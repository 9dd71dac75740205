"""Leaves that a rule keeps from the others: they are in no adapter, wherever rules are read."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import refused
from small import KEY, PARAMS, X, model

import jlora
from jlora import Frozen, Full, LoRA, many, peft

RULES = Frozen("fused"), LoRA(rank=2)
FILES = [peft.Name("layer/kernel", "up", "io")]


def test_files_need_no_names_of_frozen_leaves(tmp_path: Any) -> None:
    """The sites are checked, and the adapter is saved and loaded, by names of the others."""
    lora = jlora.transform(model, *RULES)
    assert [p.where for p in peft.check_sites(lora.sites(PARAMS, X), FILES)] == []
    unfrozen = jlora.transform(model, LoRA(rank=2)).sites(PARAMS, X)
    assert [p.where for p in peft.check_sites(unfrozen, FILES)] == ["fused"]
    base, adapter = lora.init(KEY, PARAMS, X)
    peft.save(tmp_path / "a", base, adapter, FILES)
    loaded = peft.load(tmp_path / "a", base, FILES)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)


def test_frozen_leaves_are_quantized() -> None:
    """By a scheme without a pattern too, which leaves out what is trained in full."""
    for rule, taken in ((Frozen("fused"), True), (Full("fused"), False)):
        sites = jlora.transform(model, rule, LoRA("kernel", rank=2)).sites(PARAMS, X)
        found = jlora.summary(jlora.quantize(PARAMS, jlora.Int8(), sites=sites)).quantized
        assert (("fused",) in [leaf.path for leaf in found]) == taken


def test_tables_and_plans_have_none() -> None:
    lora = jlora.transform(model, *RULES)
    base, table = many.init(lora, jax.random.split(KEY, 3), PARAMS, X)
    assert base["fused"] is PARAMS["fused"] and list(table) == ["layer"]
    adapter = lora.init(KEY, PARAMS, X)[1]
    loss = lambda adapter, base, x: lora.apply(base, adapter, x).sum()  # noqa: E731
    assert jlora.plan(loss, base, adapter, (X,)).adapter == 4 * jlora.count(adapter) == 4 * 20


def test_python_may_read_a_frozen_leaf() -> None:
    """As one that no rule takes."""

    def scaled(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["w"] * float(params["scale"][0, 0])

    params = {"w": jnp.ones((4, 6)), "scale": jnp.ones((1, 1))}
    _, adapter = jlora.transform(scaled, Frozen("scale"), LoRA("w", rank=2)).init(KEY, params, X)
    assert list(adapter) == ["w"]


def test_any_leaf_may_be_frozen() -> None:
    """Integers, vectors and unused leaves; what is frozen is not missed, but must be there."""
    frozen = Frozen("bucket|bias|unused|vocabulary")
    sites = jlora.transform(model, frozen, LoRA(rank=2)).sites(PARAMS, X)
    assert sum(site.rule == frozen for site in sites.leaves) == 4
    mistakes = {
        "has no leaf that Frozen('fusd') matches": (Frozen("fusd"), LoRA()),
        "gets no leaf: other rules take all": (Frozen("layer"), Full("layer/bias")),
    }
    for fact, rules in mistakes.items():
        with pytest.raises(ValueError, match=fact.replace("(", r"\(").replace(")", r"\)")):
            jlora.transform(model, *rules).sites(PARAMS, X)
    with refused(ValueError, "rules", "has only jlora.Frozen", "Give transform"):
        jlora.transform(model, frozen).init(KEY, PARAMS, X)
