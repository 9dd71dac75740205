"""`jlora.precondition(δ)`: each gradient times the inverse matrix of the other factor."""

import functools
import itertools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import peft_files
import pytest
from messages import refused
from nodes import SITES
from small import array, normal, some

import jlora
from jlora.extend import Change, Delta, Node, register
from jlora.types import Decomposed, Layout, LowRank

FORMS: dict[str, tuple[tuple[int, ...], Layout, Any]] = {
    name: (*site, LowRank) for name, site in SITES.items()
} | {"dora": (*SITES["plain"], Decomposed)}


def forms(*daily: str) -> Any:
    """Some every day, the others in the long run."""
    return pytest.mark.parametrize("name", some(FORMS, *daily))


def made(name: str, shape: tuple[int, ...] = ()) -> tuple[Any, Any]:
    """An adapter of rank 3 and gradients of its form, of the session's width of floats."""
    usual, layout, cls = FORMS[name]
    leaves, tree = jax.tree.flatten({"w": peft_files.node(layout, shape or usual, 3, cls=cls)})
    return (
        jax.tree.unflatten(tree, leaves),
        jax.tree.unflatten(tree, [normal(i + 10, *x.shape) for i, x in enumerate(leaves)]),
    )


def chained(tx: Any, damping: Any) -> Any:
    """An optimizer of preconditioned gradients."""
    return jlora.optimizer(optax.chain(jlora.precondition(damping), tx))


def step(adapter: Any, grads: Any, damping: Any = None) -> Any:
    """The updates of a step of descent at rate 1."""
    tx = optax.sgd(1.0)
    tx = jlora.optimizer(tx) if damping is None else chained(tx, damping)
    update = jax.jit(lambda grads, adapter: tx.update(grads, tx.init(adapter), adapter)[0])
    return update(grads, adapter)


def matrices(node: Any, name: str) -> jax.Array:
    """A, or B transposed: (matrices of the stack and of slots, inputs or outputs, r)."""
    x, layout = getattr(node, name), node.layout
    count = math.prod(x.shape[: len(layout.stack) + (layout.slots is not None)])
    return x.reshape(count, -1, 3) if name == "a" else x.reshape(count, 3, -1).mT


@forms("slots", "dora")
def test_is_the_formula(name: str) -> None:
    """By NumPy, matrix by matrix; the magnitudes of DoRA as they were."""
    damping = 0.1
    with jax.enable_x64(True):
        adapter, grads = made(name)
        updates, node, grad = (x["w"] for x in (step(adapter, grads, damping), adapter, grads))
        for mine, other in itertools.permutations("ab"):
            x, g = matrices(node, other), matrices(grad, mine)
            gram = np.einsum("nir,nis->nrs", x, x) + damping * np.eye(3)
            expected = -np.linalg.solve(gram, g.mT).mT
            np.testing.assert_allclose(matrices(updates, mine), expected, rtol=1e-9)
        if name == "dora":
            np.testing.assert_array_equal(updates.m, -grad.m)


@forms("slots")
def test_a_step_changes_the_weight_alike_however_it_is_split(name: str) -> None:
    """With A·M and M⁻¹·B, whose gradients are Ā·M⁻ᵀ and Mᵀ·B̄, ΔW has the same first change."""

    def turned(node: Any, of_a: jax.Array, of_b: jax.Array) -> Any:
        a, b = (matrices(node, x) @ by for x, by in (("a", of_a), ("b", of_b)))
        return node._replace(a=a.reshape(node.a.shape), b=b.mT.reshape(node.b.shape))

    def change(node: Any, grad: Any, damping: Any = None) -> jax.Array:
        update = step({"w": node}, {"w": grad}, damping)["w"]
        each = [(update, node), (node, update)]
        return sum(matrices(x, "a") @ matrices(y, "b").mT for x, y in each)

    with jax.enable_x64(True):
        adapter, grads = made(name)
        node, grad, m = adapter["w"], grads["w"], normal(5, 3, 3)
        back = jnp.linalg.inv(m)
        each = [(node, grad), (turned(node, m, back.T), turned(grad, back.T, m))]
        expected, actual = (change(*pair, 1e-12) for pair in each)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
        expected, actual = (change(*pair) for pair in each)
        assert not np.allclose(actual, expected, rtol=1e-2, atol=1e-2)  # without it they differ


def test_comes_before_the_transformation_and_lora_plus_after() -> None:
    """What `tx` sees are the new gradients, so that Adam's first step is their sign."""
    adapter, grads = made("plain")
    tx = chained(optax.chain(optax.scale_by_sign(), jlora.lora_plus(4.0)), 0.1)
    update = jax.jit(lambda grads, adapter: tx.update(grads, tx.init(adapter), adapter)[0])
    seen, updates = (x["w"] for x in (step(adapter, grads, 0.1), update(grads, adapter)))
    np.testing.assert_array_equal(updates.a, -np.sign(seen.a))
    np.testing.assert_array_equal(updates.b, -4 * np.sign(seen.b))
    assert "custom-call" not in update.lower(grads, adapter).compile().as_text()  # as of LAPACK


@pytest.mark.parametrize("freeze_a", [False, True])
def test_both_trees_train_the_same_adapter(freeze_a: bool) -> None:
    """Of `Params` the base stays as it is; A is in the matrix of B also where it is frozen."""
    base, (adapter, grads) = {"w": array(3, 12, 9)}, made("stacked")
    tx = chained(optax.adam(0.1), 1e-6)
    if freeze_a:
        adapter, grads = ({"w": x["w"]._replace(frozen=("a",))} for x in (adapter, grads))

    @jax.jit
    def stepped(params: Any, grads: Any) -> Any:
        return optax.apply_updates(params, tx.update(grads, tx.init(params), params)[0])

    alone = stepped(adapter, grads)
    both = stepped(jlora.Params(base, adapter), jlora.Params(base, grads))
    assert jax.tree.all(jax.tree.map(np.array_equal, both.base, base))
    laws.assert_close(both.adapter, alone, 1e-5)
    assert np.array_equal(alone["w"].a, adapter["w"].a) == freeze_a
    free = stepped(adapter, grads | {"w": grads["w"]._replace(a=0 * grads["w"].a)})
    np.testing.assert_array_equal(alone["w"].b, free["w"].b)


def test_dtypes_stay_and_zero_is_no_division() -> None:
    """bfloat16 in, bfloat16 out; B of zero gives A the gradient of zero that it has."""
    adapter, grads = made("plain")
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (adapter, grads))
    updates = jax.eval_shape(lambda x: step(*x, 1e-6), narrow)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    node, grad = adapter["w"], grads["w"]
    node, grad = node._replace(b=np.zeros_like(node.b)), grad._replace(a=np.zeros_like(grad.a))
    updates = step({"w": node}, {"w": grad}, 1e-6)["w"]
    assert not np.any(updates.a) and np.isfinite(updates.b).all()


def axes_of(names: str, layout: Layout) -> Any:
    """Those of A and B, by names of their own, of the rank too."""
    of_a, of_b = (*layout.inputs, "width"), ("width", *layout.outputs)
    return {x: (*layout.stack, *(of_a if x == "u" else of_b)) for x in names}


@register
class Renamed(Node):
    """A and B by other names."""

    u: jax.Array
    v: jax.Array
    scale: float
    layout: Layout
    labels: ClassVar = {"u": "a", "v": "b"}
    axes = staticmethod(functools.partial(axes_of, "uv"))

    def lower(self, w: Any) -> Change:
        """W' = W + s·A·B."""
        return Change((Delta(self.factor("u"), self.factor("v"), self.scale),))


@register
class TwoB(Node):
    """A and two B."""

    u: jax.Array
    v: jax.Array
    w: jax.Array | None
    layout: Layout
    labels: ClassVar = {"u": "a", "v": "b", "w": "b"}
    axes = staticmethod(functools.partial(axes_of, "uvw"))

    def lower(self, w: Any) -> Change:
        """W' = W + A·B + A·C."""
        return Change(tuple(Delta(self.factor("u"), self.factor(x), 1.0) for x in "vw"))


def test_a_and_b_are_what_is_labeled_so() -> None:
    trees = made("stacked")
    renamed = [{"w": Renamed(*x["w"][:4])} for x in trees]
    tx: Any = jlora.optimizer(jlora.precondition(0.1))
    expected, actual = (
        tx.update(grads, tx.init(adapter), adapter)[0]["w"] for adapter, grads in (trees, renamed)
    )
    laws.assert_close(actual[:2], expected[:2], 1e-6)


def test_one_a_and_one_b_are_needed() -> None:
    adapter, grads = made("plain")
    two = [{"w": TwoB(x["w"].a, x["w"].b, x["w"].b, x["w"].layout)} for x in (adapter, grads)]
    tx = jlora.precondition(0.1)
    with refused(TypeError, "", "got TwoB", "{'u': 'a', 'v': 'b', 'w': 'b'}"):
        tx.update(two[1], tx.init(two[0]), two[0])


def test_parameters_are_needed() -> None:
    adapter, grads = made("plain")
    for tx in (jlora.precondition(1e-6), chained(optax.sgd(1.0), 1e-6)):
        with refused(ValueError, "", "needs the parameters: call update(grads"):
            tx.update(grads, tx.init(adapter))


def test_a_factor_that_is_hidden_is_missed() -> None:
    """`jlora.optimizer` gives the frozen one, also through wrappers; `optax.masked` does not."""
    adapter, grads = made("plain")
    adapter, grads = ({"w": x["w"]._replace(frozen=("a",))} for x in (adapter, grads))
    tx = optax.chain(jlora.precondition(0.1), optax.sgd(1.0))
    with refused(ValueError, "", "needs A and B, but the transformation around it hides"):
        masked = optax.masked(tx, jlora.mask)
        masked.update(grads, masked.init(adapter), adapter)
    tx = jlora.optimizer(optax.MultiSteps(tx, 1).gradient_transformation())
    state = tx.init(adapter)
    updates, after = jax.jit(tx.update)(grads, state, adapter)
    laws.assert_close(updates["w"].b, step(adapter, grads, 0.1)["w"].b, 1e-5)
    assert jax.tree.structure(after) == jax.tree.structure(state)
