"""The set of methods is open: those of `own_methods` pass the laws, merge, save and restore."""

import copy
import dataclasses
import sys
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import own_methods
import pytest
from cases import CASES, SUBJECTS, Case
from jax.sharding import PartitionSpec as P
from small import array

import jlora
from jlora import _adapters as adapters
from jlora import checkpoint, peft
from jlora.extend import Node, register

METHODS = (own_methods.Gain, own_methods.Diagonal)
# A gain is no factor: where W is joined, or multiplied with another weight, along the inputs of the
# product, it would be one of inputs and outputs at once. With batch statistics behind it, its
# gradient is a difference of large numbers.
NOT_A_GAIN = {
    "padded",
    "concatenate_inputs",
    "weight_times_weight",
    "weights_multiplied_with_one_repeated",
    "two_weights_meet_along_a_new_axis",
    "nnx_train",
    "nnx_state_as_argument",
}


def own_rules(case: Case, method: type) -> tuple[Any, ...]:
    """The rules of a case with `LoRA` replaced."""
    return tuple(method(r.pattern) if isinstance(r, jlora.LoRA) else r for r in case.rules)


LATER = ("dense", "call", "tree", "nnx", "no_site", "lookup", "jit")  # subjects of the long run


def is_for(case: Case, method: type) -> bool:
    """Whether the case is one for another method than LoRA."""
    plain = all(
        r == jlora.LoRA(r.pattern, rank=r.rank, alpha=r.alpha)
        for r in case.rules
        if isinstance(r, jlora.LoRA)
    )
    excluded = method is own_methods.Gain and case.name in NOT_A_GAIN
    return plain and case.sites > 0 and case.subject != "model" and not excluded


def table() -> list[Any]:
    """The first of each subject for every day, with one of the methods by turns.

    Every law for that of products and of experts, one for each method, and in the long run.
    """
    rows = []
    for k, method in enumerate(METHODS):
        for n, subject in enumerate(SUBJECTS):
            cases = [c for c in CASES if c.subject == subject and is_for(c, method)]
            for i, case in enumerate(cases):
                name = f"{method.__name__}-{case.name}"
                daily = not (case.slow or i or (n + k) % 2) and subject not in LATER
                every_law = not daily or subject in ("product", "experts")
                marks = [] if daily else [pytest.mark.slow]
                rows.append(pytest.param(case, method, every_law, id=name, marks=marks))
    return rows


@pytest.mark.parametrize(("case", "method", "every_law"), table())
def test_laws(case: Case, method: type, every_law: bool) -> None:
    """Those of LoRA itself."""
    case = dataclasses.replace(case, rules=own_rules(case, method))
    with laws.precision(case, jnp.float32) as tolerance:
        made = laws.make(case, jnp.float32)
        laws.hold(made, tolerance, every_law)


def model(params: Any, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ w), None

    return jax.lax.scan(layer, x, params["layers"])[0] @ params["head"]


@pytest.fixture(params=METHODS, scope="module")
def adapted(request: Any) -> tuple[Any, ...]:
    """Transform, base, random adapter, input and rules of a small scanned model."""
    rules = (request.param("layers"), jlora.Full("head"))
    params, x = {"layers": array(3, 4, 4) / 2, "head": array(4, 2) / 2}, array(5, 4) / 2
    lora = jlora.transform(model, *rules)
    base, adapter = lora.init(jax.random.key(1), params, x)
    return lora, base, laws.randomize(adapter), x, rules


def test_saved_and_restored(adapted: Any, tmp_path: Any) -> None:
    _, base, adapter, _, rules = adapted
    checkpoint.save(tmp_path / "a", adapter, rules, base=base)
    assert checkpoint.read(tmp_path / "a").rules == rules
    for like in (None, adapter):
        restored = checkpoint.restore(tmp_path / "a", like=like, base=base)
        assert jax.tree.structure(restored) == jax.tree.structure(adapter)
        jax.tree.map(np.testing.assert_array_equal, restored, adapter)


def test_sites_and_counts(adapted: Any) -> None:
    lora, base, adapter, x, rules = adapted
    sites = lora.sites(base, x)
    trained = {own_methods.Gain: 3 * 4, own_methods.Diagonal: 3 * 2}[type(rules[0])]
    assert sites["layers"].trainable == trained
    assert f"{type(rules[0]).__name__}('layers')" in str(sites)
    assert adapters.weight_shape(adapter["layers"]) == {12: (3, 0, 4)}.get(trained, (3, 4, 4))


def test_only_what_is_trained_moves(adapted: Any) -> None:
    lora, base, adapter, x, _ = adapted
    params = jlora.Params(base, adapter)
    tx = jlora.optimizer(optax.sgd(0.1))
    loss = lambda p: lora.apply(p.base, p.adapter, x).sum()  # noqa: E731
    grads = jax.jit(jax.grad(loss, allow_int=True))(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    moved = jax.tree.map(lambda u: bool(np.any(np.asarray(u) != 0)), updates)
    assert moved == jlora.mask(params)


def test_lies_as_the_base(adapted: Any) -> None:
    _, _, adapter, _, _ = adapted
    found = jlora.sharding.specs({"layers": P("s", "i", "o"), "head": P()}, adapter)["layers"]
    expected = {
        "gain": P("s", "o"),
        "a": P("s", "i", None),
        "d": P("s", None),
        "b": P("s", None, "o"),
    }
    for name in adapters.arrays(adapter["layers"]):
        assert getattr(found, name) == expected[name]


def test_merged_and_back(adapted: Any) -> None:
    lora, base, adapter, x, rules = adapted
    merged = jlora.merge(base, adapter)
    np.testing.assert_allclose(model(merged, x), lora.apply(base, adapter, x), rtol=1e-5, atol=1e-5)
    if isinstance(rules[0], own_methods.Gain):
        with pytest.raises(ValueError, match=r"`unmerge` cannot take GainNode back at 'layers': "):
            jlora.unmerge(merged, adapter)
    else:
        back = jlora.unmerge(merged, adapter)["layers"]
        np.testing.assert_allclose(back, base["layers"], atol=1e-6)


def test_pefts_files_have_no_place_for_it(adapted: Any, tmp_path: Any) -> None:
    _, base, adapter, _, rules = adapted
    names = [peft.Name("layers", r"layers.{}", "lio"), peft.Name("head", "head", "io")]
    node = {own_methods.Gain: "GainNode", own_methods.Diagonal: "DiagonalNode"}[type(rules[0])]
    with pytest.raises(ValueError, match=f"  layers: PEFT's files have no place for a {node}"):
        peft.save(tmp_path / "p", base, adapter, names)


def test_a_node_is_a_named_tuple(adapted: Any) -> None:
    node = adapted[2]["layers"]
    assert type(node).__match_args__ == node._fields
    again = type(node)._make(node)
    assert again._asdict() == node._asdict()
    if sys.version_info >= (3, 13):
        assert copy.replace(node, layout=None).layout is None  # pyright: ignore
    with pytest.raises(TypeError, match="fields of Late with a default must come after those"):

        @register
        class Late(Node):  # pyright: ignore
            labels: ClassVar = {"b": "b"}
            a: Any = 7
            b: Any  # pyright: ignore


def test_a_rule_is_one_of_a_registered_class() -> None:
    """A checkpoint could not name it."""

    @dataclasses.dataclass(frozen=True)
    class Mine(jlora.LoRA):
        """A subclass without `register`."""

    with pytest.raises(TypeError, match=r"`rules` has Mine\('w'\), whose class is not registered"):
        jlora.transform(lambda p, x: x @ p["w"], Mine("w"))


def test_misfit_is_named(adapted: Any) -> None:
    lora, base, adapter, x, _ = adapted
    other = {"layers": jnp.ones((3, 4, 5)), "head": base["head"]}
    with pytest.raises(ValueError, match=r"layers: a weight of shape \(3, 4, 5\) needs "):
        lora.apply(other, adapter, x)
