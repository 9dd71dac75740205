"""`jlora.sharding`: where the factors of real models belong, and what is refused.

What needs a mesh of several devices is in `sharding_on_devices.py`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sharding_models as models
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr, tree_leaves_with_path
from small import some

import jlora
from jlora import sharding
from jlora._adapters import is_node

AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
MESH = AbstractMesh(tuple(models.MESH.values()), tuple(models.MESH), (AUTO, AUTO))


@pytest.fixture(params=some(models.MODELS, "lists", "scanned", "experts", "nnx"))
def model(request):
    """Each of the models; that of linen is below with its boxes, every day."""
    return models.MODELS[request.param]()


def nodes(tree):
    """The leaves of a tree of specs by joined path: a pair for A and B."""
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_node)[0]
    return {"/".join(key.key for key in path): (x.a, x.b) if is_node(x) else x for path, x in flat}


def on(mesh, base, **kwargs):
    """A tree of NamedShardings from one of specs."""
    is_spec = lambda x: x is None or isinstance(x, P)  # noqa: E731
    return jax.tree.map(lambda s: NamedSharding(mesh, s or P(), **kwargs), base, is_leaf=is_spec)


# ----------------------------------------------------------------------------- what is right


def shapes_of(model):
    """Shapes that carry a sharding, as for a restore or a compilation."""
    lies = jax.tree.unflatten(
        jax.tree.structure(model.params), jax.tree.leaves(on(MESH, model.base))
    )
    return jax.tree.map(
        lambda w, s: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=s), model.params, lies
    )


# What `specs` is given, and the memory that is said there.
FORMS = {
    "specs": (lambda model: (model.base,), None),
    "specs and a mesh": (lambda model: (model.base, MESH), None),
    "shardings": (lambda model: (on(MESH, model.base, memory_kind="pinned_host"),), "pinned_host"),
    "shapes": (lambda model: (shapes_of(model),), None),
}


@pytest.mark.parametrize("form", FORMS)
def test_specs(model, form):
    """Of the structure of the adapter; each keeps the mesh and the memory of W's."""
    make, memory = FORMS[form]
    adapter = models.adapter_of(model, abstract=True)
    base, *mesh = make(model)
    found = sharding.specs(base, adapter, *mesh)
    assert jax.tree.structure(found) == jax.tree.structure(adapter)
    if form != "specs":
        leaves = jax.tree.leaves(found)
        assert {s.mesh for s in leaves} == {MESH}
        assert memory is None or {s.memory_kind for s in leaves} == {memory}
        found = jax.tree.map(lambda s: s.spec, found)
    assert nodes(found) == model.expected


@pytest.mark.parametrize("name", some([n for n in models.MODELS if n != "nnx"], "scanned"))
def test_specs_of_one_device(name):
    """Arrays of one device, without metadata: so that a script is the same there."""
    model = models.MODELS[name]()
    adapter = models.adapter_of(model)
    found = sharding.specs(model.params, adapter)
    assert jax.tree.structure(found) == jax.tree.structure(adapter)
    assert set(jax.tree.leaves(found)) == {jax.tree.leaves(model.params)[0].sharding}
    jax.device_put(adapter, found)


def test_specs_under_explicit_axes():
    """In a traced function the type says it."""
    mesh = jax.make_mesh((1, 1), tuple(models.MESH), (EXPLICIT, EXPLICIT))
    model = models.scanned()
    adapter, seen = models.adapter_of(model), []
    base = jax.device_put(model.params, on(mesh, model.base))
    jax.jit(lambda base: seen.append(sharding.specs(base, adapter)))(base)
    assert nodes(jax.tree.map(lambda s: s.spec, seen[0])) == model.expected


def test_dropout_keys_lie_as_the_stack():
    model = models.experts()
    adapter = jax.tree.map(lambda x: x, models.adapter_of(model))
    adapter = {k: x._replace(dropout=0.5) for k, x in adapter.items()}
    dropped = jlora.dropout(adapter, jax.random.key(0))
    found = sharding.specs(model.base, dropped)
    assert jax.tree.structure(found) == jax.tree.structure(dropped)
    assert found["up"].key == P("fsdp")


# Boxes, variables, and what Flax makes of them.


def test_logical_boxes():
    """The logical names go to A and B, and then to the mesh as Flax's own do."""
    model, boxed = models.linen(), models.boxed()
    adapter = models.adapter_of(model, abstract=True)
    for base in (boxed, jax.eval_shape(models.boxed), nn.get_partition_spec(boxed)):
        found = sharding.specs(base, adapter)
        query = found["params"]["blocks"]["query"]["kernel"]
        assert (query.a, query.b) == (P("layers", "embed", None), P("layers", None, "heads", "kv"))
        placed = nn.logical_to_mesh_sharding(found, MESH, models.RULES)
        assert nodes(jax.tree.map(lambda s: s.spec, placed)) == model.expected


def test_an_adapter_of_boxed_parameters():
    boxed = models.boxed()
    lora = jlora.transform(models.Decoder().apply, jlora.LoRA("query/kernel", rank=2))
    _, adapter = lora.init(jax.random.key(0), boxed, models.IDS)
    found = sharding.specs(boxed, adapter)
    assert found["params"]["blocks"]["query"]["kernel"].a == P("layers", "embed", None)


def test_partitioned_boxes_that_lie_on_a_mesh():
    mesh = jax.make_mesh((1, 1), tuple(models.MESH), (AUTO, AUTO))
    model = models.linen()
    placed = jax.device_put(model.params, on(mesh, model.base))
    boxed = jax.tree.map(
        lambda box, w: box.replace_boxed(w) if hasattr(box, "names") else w,
        models.boxed(),
        placed,
        is_leaf=lambda x: hasattr(x, "names"),
    )
    found = sharding.specs(boxed, models.adapter_of(model, abstract=True))
    assert nodes(jax.tree.map(lambda s: s.spec, found)) == model.expected


def test_nnx_metadata():
    model, (_, state) = models.nnx_model(), models.nnx_split()
    adapter = models.adapter_of(model, abstract=True)
    shapes = jax.eval_shape(lambda: state)
    for base in (
        state,
        shapes,
        nnx.get_partition_spec(shapes),
        nnx.get_named_sharding(state, MESH),
    ):
        found = sharding.specs(base, adapter)
        assert nodes(jax.tree.map(lambda s: getattr(s, "spec", s), found)) == model.expected


# Parts that cannot be divided.


def fused(length, entry):
    """A kernel of two slots, whose output axis lies as `entry` says."""
    model = lambda p, x: x @ p["w"]  # noqa: E731
    lora = jlora.transform(model, jlora.LoRA("w", rank=2, slots=jlora.Slots(2, (0, 1))))
    params, x = {"w": jnp.ones((8, length))}, jnp.ones((1, 8))
    return lora.init(jax.random.key(0), params, x)[1], {"w": P(None, entry)}


@pytest.mark.parametrize(
    ("length", "entry", "expected"),
    [
        (8, "tensor", "tensor"),
        (6, "tensor", None),
        (16, ("fsdp", "tensor"), ("fsdp", "tensor")),
        (24, ("fsdp", "tensor"), None),
    ],
)
def test_slots_that_cannot_be_divided_are_replicated(length, entry, expected):
    adapter, base = fused(length, entry)
    assert sharding.specs(base, adapter, MESH)["w"].b.spec == P(None, None, expected)
    assert sharding.specs(on(MESH, base), adapter)["w"].b.spec == P(None, None, expected)
    with jax.sharding.use_abstract_mesh(MESH):
        assert sharding.specs(base, adapter)["w"].b == P(None, None, expected)


def test_without_a_mesh_slots_take_the_axis_of_w():
    adapter, base = fused(6, "tensor")
    assert sharding.specs(base, adapter)["w"].b == P(None, None, "tensor")


def test_unconstrained_axes_stay_so():
    model = models.scanned()
    base = model.base | {"q": P(None, P.UNCONSTRAINED, "tensor")}
    found = sharding.specs(base, models.adapter_of(model, abstract=True), MESH)
    assert found["q"].a.spec == P(None, P.UNCONSTRAINED, None)


# --------------------------------------------------------------------------------- moments


@pytest.mark.parametrize(
    "tx",
    [
        jlora.optimizer(optax.adamw(1e-3)),
        jlora.optimizer(optax.chain(optax.clip(1.0), optax.adam(1e-3), jlora.lora_plus(4))),
        optax.MultiSteps(optax.adam(1e-3), 2),
        optax.sgd(1e-3),
    ],
    ids=["adamw", "lora_plus", "multisteps", "sgd"],
)
def test_moments(tx):
    """What has a parameter's path and shape lies as it does, the rest is replicated."""
    model = models.lists()
    adapter = models.adapter_of(model, abstract=True)
    state = jax.eval_shape(tx.init, adapter)
    for base, replicated in ((model.base, P()), (on(MESH, model.base), NamedSharding(MESH, P()))):
        specs = sharding.specs(base, adapter)
        found = sharding.moments(state, adapter, specs)
        assert jax.tree.structure(found) == jax.tree.structure(state)
        expected = {keystr(p): s for p, s in tree_leaves_with_path(specs)}
        leaves = tree_leaves_with_path(state)
        for (path, x), place in zip(leaves, jax.tree.leaves(found), strict=True):
            name = keystr(path)
            mine = [s for key, s in expected.items() if name.endswith(key)]
            assert place == (mine[0] if x.ndim else replicated), name


# ---------------------------------------------------------------------------------- errors

UP = "layers/0/up"


def replaced(**places):
    """The base of `lists` with other places of its first layer, and its adapter."""
    model = models.lists()
    first, second = model.base["layers"]
    base = model.base | {"layers": [first | places, second]}
    return base, models.adapter_of(model, abstract=True)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"up": P("fsdp", "tenzor")}, "the mesh has no axis 'tenzor'; it has fsdp, tensor"),
        ({"up": P("fsdp", "fsdp")}, "the mesh axis 'fsdp' is used for more than one axis"),
        (
            {"up": P(None, None, "fsdp")},
            "P(None, None, 'fsdp') has 3 entries for a weight of shape (16, 32)",
        ),
    ],
)
def test_partitions_that_do_not_fit(places, message):
    base, adapter = replaced(**places)
    with pytest.raises(ValueError) as error:
        sharding.specs(base, adapter, MESH)
    assert str(error.value) == (
        "`base` has partitions that do not fit at 1 of 7 paths of `adapter`:\n"
        f"  {UP}: {message}\nCorrect them in `base`: the adapter follows W."
    )


def test_lengths_that_cannot_be_divided():
    base, adapter = replaced()
    mesh = AbstractMesh((5, 3), ("fsdp", "tensor"), (AUTO, AUTO))
    with pytest.raises(ValueError) as error:
        sharding.specs(base, adapter, mesh)
    assert f"  {UP}: axis 0 of length 16 cannot be divided over fsdp=5 × tensor=3\n" in str(
        error.value
    )
    assert "6 of 7 paths" in str(error.value)


def test_the_mesh_in_scope_is_used():
    base, adapter = replaced()
    with (
        jax.sharding.use_abstract_mesh(AbstractMesh((5, 3), ("fsdp", "tensor"), (AUTO, AUTO))),
        pytest.raises(ValueError, match="cannot be divided over fsdp=5"),
    ):
        sharding.specs(base, adapter)


def test_names_that_the_mesh_in_scope_lacks_are_logical():
    base, adapter = replaced(up=P("embed", "mlp"))
    with jax.sharding.use_abstract_mesh(MESH):
        assert sharding.specs(base, adapter)["layers"]["0"]["up"].a == P("embed", None)


@pytest.mark.parametrize(
    ("leaf", "got"),
    [
        ("fsdp", "str 'fsdp'"),
        (np.ones((16, 32)), "ndarray without a sharding"),
        (jax.ShapeDtypeStruct((16, 32), jnp.float32), "ShapeDtypeStruct without a sharding"),
    ],
)
def test_leaves_that_say_nothing(leaf, got):
    base, adapter = replaced(up=leaf)
    with pytest.raises(TypeError) as error:
        sharding.specs(base, adapter)
    assert str(error.value) == (
        "`base` must be a tree of PartitionSpec or NamedSharding, of arrays or "
        "jax.ShapeDtypeStructs that carry one, or of Flax's partitioned parameters; it says "
        f"nothing of sharding at 1 of 7 paths of `adapter`:\n  {UP}: got {got}"
    )


def test_arrays_in_jit_with_automatic_axes():
    model = models.scanned()
    adapter = models.adapter_of(model)
    with pytest.raises(TypeError, match=r"mesh axes are not explicit.*unknown in jit"):
        jax.jit(lambda base: sharding.specs(base, adapter))(model.params)


def test_tuples_in_place_of_specs():
    base, adapter = replaced(up=("fsdp", "tensor"))
    with pytest.raises(ValueError) as error:
        sharding.specs(base, adapter)
    assert str(error.value) == (
        "`base` lacks 1 of 7 paths of `adapter`:\n"
        f"  {UP}: a container of 2 leaves instead of one; a tuple is a container, "
        "PartitionSpec(...) a leaf\n"
        "Give the partitions of the tree that `init` was given, with the same paths."
    )


def test_paths_that_are_missing():
    model = models.linen()
    with pytest.raises(ValueError) as error:
        sharding.specs(model.base["params"], models.adapter_of(model, abstract=True))
    assert "`base` lacks 7 of 7 paths of `adapter`:\n" in str(error.value)
    assert "  params/embed/embedding: not in `base`." in str(error.value)
    assert "embed/embedding" in str(error.value)


def test_swapped_arguments():
    model = models.scanned()
    with pytest.raises(TypeError, match="are `base` and `adapter` swapped"):
        sharding.specs(models.adapter_of(model), model.base)
    with pytest.raises(TypeError, match="`adapter` must be a nested dict of LowRank nodes"):
        sharding.specs(model.base, model.base)


def test_shardings_that_name_no_axes():
    """What is not one device and names no axes cannot be followed."""

    class Other(jax.sharding.Sharding):
        @property
        def device_set(self):
            return {0, 1}

    base, adapter = replaced(up=Other())
    with pytest.raises(ValueError, match="a Other names no axes; expected a NamedSharding"):
        sharding.specs(base, adapter)


# ------------------------------------------------------------------------------ whole along axes


@pytest.mark.parametrize(
    ("spec", "axes", "expected"),
    [
        (P("fsdp", "tensor"), ["fsdp"], P(None, "tensor")),
        (P("fsdp", "tensor"), ["fsdp", "tensor"], P(None, None)),
        (P(("fsdp", "tensor"), None), ["fsdp"], P("tensor", None)),
        (P(("fsdp", "expert", "tensor")), ["expert"], P(("fsdp", "tensor"))),
        (P(P.UNCONSTRAINED, "fsdp"), ["fsdp"], P(P.UNCONSTRAINED, None)),
        (P("fsdp"), [], P("fsdp")),
    ],
)
def test_replicated(spec, axes, expected):
    assert sharding.replicated({"w": spec}, *axes) == {"w": expected}


def test_replicated_along_an_axis_that_is_not_there():
    places = on(MESH, {"w": P("fsdp")})
    with pytest.raises(ValueError, match=r"^`axes` has 'data', but the mesh of `specs` has fsdp,"):
        sharding.replicated(places, "data")
