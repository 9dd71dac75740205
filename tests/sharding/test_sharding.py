"""`jlora.sharding`: where the factors of real models belong, and what is refused.

What needs a mesh of several devices is in `sharding_on_devices.py`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sharding_models as models
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr, tree_leaves_with_path
from meshes import mesh_of, on
from messages import all_refused
from small import some

import jlora
from jlora import sharding
from jlora._adapters import is_node

NAMES = ("fsdp", "tensor")


def abstract(*shape: int) -> AbstractMesh:
    """A mesh that needs no devices."""
    return AbstractMesh(shape, NAMES, (AxisType.Auto, AxisType.Auto))


MESH, ODD = abstract(4, 2), abstract(5, 3)


def nodes(tree: Any) -> Any:
    """The PartitionSpecs of an adapter by joined path: a pair for A and B."""
    tree = jax.tree.map(lambda s: getattr(s, "spec", s), tree)
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_node)[0]
    return {"/".join(key.key for key in path): (x.a, x.b) if is_node(x) else x for path, x in flat}


def shapes_of(model: models.Model) -> Any:
    """Shapes that carry a sharding, as for a restore or a compilation."""
    struct = lambda w, s: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(struct, model.params, on(MESH, model.base))


def on_host(model: models.Model) -> Any:
    return jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), on(MESH, model.base))


# What `specs` is given.
FORMS: dict[str, Callable[[models.Model], Any]] = {
    "specs": lambda model: (model.base,),
    "specs and a mesh": lambda model: (model.base, MESH),
    "shardings": lambda model: (on_host(model),),
    "shapes": lambda model: (shapes_of(model),),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", some(models.MODELS, "lists", "scanned", "experts", "nnx"))
def test_specs(name: str, form: str) -> None:
    """Of the structure of the adapter; each keeps the mesh of W's, but not the host's memory."""
    model = models.MODELS[name]()
    adapter = models.adapter_of(model, abstract=True)
    base, *mesh = FORMS[form](model)
    found = sharding.specs(base, adapter, *mesh)
    assert jax.tree.structure(found) == jax.tree.structure(adapter)
    assert nodes(found) == model.expected
    if form != "specs":
        assert {s.mesh for s in jax.tree.leaves(found)} == {MESH}
        assert {s.memory_kind for s in jax.tree.leaves(found)} <= {None, "device"}


def test_codes_stay_in_the_memory_of_the_weight() -> None:
    base = jlora.quantize({"w": jnp.ones((32, 8))}, jlora.Int8("w"))
    place = NamedSharding(MESH, P("fsdp"), memory_kind="pinned_host")
    found = jax.tree.leaves(sharding.specs({"w": place}, base))
    assert {s.memory_kind for s in found} == {"pinned_host"}


def test_specs_of_no_adapter() -> None:
    assert sharding.specs({"w": P("fsdp")}, {}, MESH) == {}


@pytest.mark.parametrize("name", some(models.MODELS, "lists", "fused"))
def test_specs_of_a_table(name: str) -> None:
    """The axis of slots is not sharded; the others are as without it."""
    model = models.MODELS[name]()
    one = models.adapter_of(model, abstract=True)
    table = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), one)
    found, alone = sharding.specs(model.base, table, MESH), sharding.specs(model.base, one, MESH)
    expected = jax.tree.map(lambda s: NamedSharding(MESH, P(None, *s.spec)), alone)
    assert nodes(found) == nodes(expected)


@pytest.mark.parametrize("name", some([n for n in models.MODELS if n != "nnx"], "scanned"))
def test_specs_of_one_device(name: str) -> None:
    """Arrays of one device, without metadata: so that a script is the same there."""
    model = models.MODELS[name]()
    adapter = models.adapter_of(model)
    found = sharding.specs(model.params, adapter)
    assert jax.tree.structure(found) == jax.tree.structure(adapter)
    assert set(jax.tree.leaves(found)) == {jax.tree.leaves(model.params)[0].sharding}
    jax.device_put(adapter, found)


def test_specs_under_explicit_axes() -> None:
    """In a traced function the type says it."""
    model, seen = models.scanned(), []
    adapter = models.adapter_of(model)
    base = jax.device_put(model.params, on(mesh_of(AxisType.Explicit, (1, 1)), model.base))
    jax.jit(lambda base: seen.append(sharding.specs(base, adapter)))(base)
    assert nodes(seen[0]) == model.expected


def test_dropout_keys_lie_as_the_stack() -> None:
    model = models.experts()
    adapter = {k: x._replace(dropout=0.5) for k, x in models.adapter_of(model).items()}
    dropped = jlora.dropout(adapter, jax.random.key(0))
    found = sharding.specs(model.base, dropped)
    assert jax.tree.structure(found) == jax.tree.structure(dropped)
    assert found["up"].key == P("fsdp")


def test_boxes_of_linen() -> None:
    """Logical names go to A and B, and then to the mesh as Flax's; an array on a mesh says it."""
    model, boxed = models.linen(), models.boxed()
    lora = jlora.transform(model.apply, *model.rules)
    adapter = jax.eval_shape(lora.init, jax.random.key(0), boxed, models.IDS)[1]
    for base in (boxed, jax.eval_shape(models.boxed), nn.get_partition_spec(boxed)):
        found = sharding.specs(base, adapter)
        query = found["params"]["blocks"]["query"]["kernel"]
        assert (query.a, query.b) == (P("layers", "embed", None), P("layers", None, "heads", "kv"))
        assert nodes(nn.logical_to_mesh_sharding(found, MESH, models.RULES)) == model.expected
    is_box = lambda x: hasattr(x, "names")  # noqa: E731
    there = jax.device_put(model.params, on(mesh_of(shape=(1, 1)), model.base))
    boxed = jax.tree.map(
        lambda box, w: box.replace_boxed(w) if is_box(box) else w, boxed, there, is_leaf=is_box
    )
    assert nodes(sharding.specs(boxed, adapter)) == model.expected


def test_variables_of_nnx() -> None:
    model, (_, state) = models.nnx_model(), models.nnx_split()
    adapter = models.adapter_of(model, abstract=True)
    shapes = jax.eval_shape(lambda: state)
    specs, shardings = nnx.get_partition_spec(shapes), nnx.get_named_sharding(state, MESH)
    for base in (state, shapes, specs, shardings):
        assert nodes(sharding.specs(base, adapter)) == model.expected


@pytest.mark.parametrize(
    ("length", "entry", "expected"),
    [(8, "tensor", "tensor"), (16, NAMES, NAMES), (24, NAMES, None)],
)
def test_slots_that_cannot_be_divided_are_replicated(length: int, entry: Any, expected: Any):
    """Where the mesh is known; without one they take the axis of W."""
    rule, base = jlora.LoRA("w", rank=2, slots=jlora.Slots(2, (0, 1))), {"w": P(None, entry)}
    lora, params = jlora.transform(lambda p, x: x @ p["w"], rule), {"w": jnp.ones((8, length))}
    adapter = jax.eval_shape(lora.init, jax.random.key(0), params, jnp.ones((1, 8)))[1]
    for given in ((base, adapter, MESH), (on(MESH, base), adapter)):
        assert sharding.specs(*given)["w"].b.spec == P(None, None, expected)
    assert sharding.specs(base, adapter)["w"].b == P(None, None, entry)
    with jax.sharding.use_abstract_mesh(MESH):
        assert sharding.specs(base, adapter)["w"].b == P(None, None, expected)


def test_unconstrained_axes_stay_so() -> None:
    model = models.scanned()
    base = model.base | {"q": P(None, P.UNCONSTRAINED, "tensor")}
    found = sharding.specs(base, models.adapter_of(model, abstract=True), MESH)
    assert found["q"].a.spec == P(None, P.UNCONSTRAINED, None)


TXS = {
    "lora_plus": jlora.optimizer(
        optax.chain(optax.clip(1.0), optax.adam(1e-3), jlora.lora_plus(4))
    ),
    "multisteps": optax.MultiSteps(optax.adam(1e-3), 2),
    "sgd": optax.sgd(1e-3),
}


@pytest.mark.parametrize("name", some(TXS, "lora_plus", "multisteps"))
def test_moments(name: str) -> None:
    """What has a parameter's path and shape lies as it does, the rest is replicated."""
    model = models.lists()
    adapter = models.adapter_of(model, abstract=True)
    state = jax.eval_shape(TXS[name].init, adapter)
    for base, replicated in ((model.base, P()), (on(MESH, model.base), NamedSharding(MESH, P()))):
        specs = sharding.specs(base, adapter)
        found = sharding.moments(state, adapter, specs)
        assert jax.tree.structure(found) == jax.tree.structure(state)
        expected = {keystr(p): s for p, s in tree_leaves_with_path(specs)}
        leaves = tree_leaves_with_path(state)
        for (path, x), place in zip(leaves, jax.tree.leaves(found), strict=True):
            mine = [s for key, s in expected.items() if keystr(path).endswith(key)]
            assert place == (mine[0] if x.ndim else replicated), keystr(path)


# ---------------------------------------------------------------------------------- errors


class Other(jax.sharding.Sharding):
    """Neither of one device nor with names."""

    @property
    def device_set(self) -> Any:
        """Two."""
        return {0, 1}


def specs(mesh: Any = None, scope: Any = None, **places: Any) -> Any:
    """The specs of `lists` with other places of its first layer."""
    model = models.lists()
    first, second = model.base["layers"]
    base = model.base | {"layers": [first | places, second]}
    with jax.sharding.use_abstract_mesh(scope or jax.sharding.get_abstract_mesh()):
        return sharding.specs(base, models.adapter_of(model, abstract=True), mesh)


def of_linen() -> Any:
    """The specs of a base without its collection."""
    model = models.linen()
    return sharding.specs(model.base["params"], models.adapter_of(model, abstract=True))


SCANNED = models.scanned()
REFUSALS: dict[type[Exception], dict[str, Callable[[], Any]]] = {
    ValueError: {
        "`base` ... layers/0/up ... no axis 'tenzor'": lambda: specs(MESH, up=P("fsdp", "tenzor")),
        "`base` ... layers/0/up ... 'fsdp' is used for": lambda: specs(MESH, up=P("fsdp", "fsdp")),
        "`base` ... layers/0/up ... has 3 entries": lambda: specs(up=P(None, None, "fsdp")),
        "`base` ... layers/0/up ... a Other names no axes": lambda: specs(up=Other()),
        "`base` ... layers/0/bias ... axis 0 of length 32 cannot be": lambda: specs(ODD),
        "`base` ... be divided over fsdp=5 × tensor=3": lambda: specs(scope=ODD),
        "`base` ... layers/0/up ... a container of 2 leaves": lambda: specs(up=("fsdp", "tensor")),
        "`base` ... params/blocks/down/kernel ... not in `base`. Near misses:": of_linen,
        "`axes` ... got 'data'.": lambda: sharding.replicated(on(MESH, {"w": P("fsdp")}), "data"),
    },
    TypeError: {
        "`base` ... layers/0/up ... got str 'fsdp'": lambda: specs(up="fsdp"),
        "`base` ... layers/0/up ... got": lambda: specs(up=np.ones((16, 32))),
        "`base` ... layers/0/up ... got ShapeDtypeStruct without": lambda: specs(
            up=jax.ShapeDtypeStruct((16, 32), jnp.float32)
        ),
        "so its sharding is unknown in jit": lambda: jax.jit(
            lambda base: sharding.specs(base, models.adapter_of(SCANNED))
        )(SCANNED.params),
        "Are two arguments swapped": lambda: sharding.specs(
            models.adapter_of(SCANNED), SCANNED.base
        ),
        "`adapter` ... a nested dict of LowRank nodes": lambda: sharding.specs(
            SCANNED.base, SCANNED.base
        ),
    },
}


test_refusals = all_refused(REFUSALS)


def test_names_that_the_mesh_in_scope_lacks_are_logical() -> None:
    assert specs(scope=MESH, up=P("embed", "mlp"))["layers"]["0"]["up"].a == P("embed", None)


@pytest.mark.parametrize(
    ("spec", "axes", "expected"),
    [
        (P("fsdp", "tensor"), ["fsdp"], P(None, "tensor")),
        (P(("fsdp", "expert", "tensor")), ["expert"], P(("fsdp", "tensor"))),
        (P(P.UNCONSTRAINED, "fsdp"), ["fsdp"], P(P.UNCONSTRAINED, None)),
        (P("fsdp"), [], P("fsdp")),
    ],
)
def test_replicated(spec: P, axes: list[str], expected: P) -> None:
    assert sharding.replicated({"w": spec}, *axes) == {"w": expected}
