"""`peft.read` and `peft.write`: an adapter without its model, as it was, renamed, or in part."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft_models as models
import pytest
from peft_files import CONFIG, ENDS, TENSORS, Folder, assert_equal, config_of, pair, write
from safetensors.numpy import save_file

from jlora import peft
from jlora._adapters._gated import Routed
from jlora.peft.adapter._config import DEFAULTS
from jlora.types import Layout, LowRank, Replaced

# The fields that choose modules, ranks, scales and rows.
CHOOSING = (
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "r",
    "lora_alpha",
    "use_rslora",
    "trainable_token_indices",
)
every_case = pytest.mark.parametrize("name", models.CASES)


def without(contents: peft.Contents, *fields: str) -> peft.Contents:
    config = {key: x for key, x in contents.config.items() if key not in fields}
    return dataclasses.replace(contents, config=config)


@every_case
def test_written_as_it_was_read(name: str, tmp_path: Folder) -> None:
    """Each tensor to the bit, each field of the configuration."""
    case = models.case(name)
    fields = peft.write(tmp_path / "a", peft.read(case.folder))
    assert_equal(models.read(tmp_path / "a" / TENSORS), models.read(case.folder / TENSORS))
    assert config_of(tmp_path / "a") == fields == {**DEFAULTS, **config_of(case.folder)}


def test_reading_while_jax_traces() -> None:
    """For shapes and dtypes alone."""
    folder = models.case("conv").folder
    shapes = jax.eval_shape(lambda: dict(peft.read(folder).leaves))
    form = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert form(shapes) == form(dict(peft.read(folder).leaves))


def exchange(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A and B of three experts, as those of the transposed weights: as PEFT before 0.21 wrote."""
    found = dict(tensors)
    for key in [key for key in tensors if "experts." in key and ".lora_A." in key]:
        other = key.replace("lora_A", "lora_B")
        a, b = tensors[key], tensors[other]
        a, b = a.reshape(3, -1, a.shape[1]), b.reshape(len(b), -1, 3)
        found[key] = np.ascontiguousarray(b.transpose(2, 1, 0).reshape(-1, len(b)))
        found[other] = np.ascontiguousarray(a.transpose(2, 1, 0).reshape(a.shape[2], -1))
    return found


@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_experts_for_vllm(exchanged: bool, reverse: bool, tmp_path: Folder) -> None:
    """The same products with the inputs in A, whatever is in the file's A and first in its list."""
    case = models.case("experts")
    peft.write(tmp_path / "a", peft.read(case.folder), profile="vllm")
    fields, tensors = config_of(tmp_path / "a"), models.read(tmp_path / "a" / TENSORS)
    if reverse:
        fields["target_parameters"].reverse()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / CONFIG).write_text(json.dumps(fields))
    save_file(exchange(tensors) if exchanged else tensors, tmp_path / "b" / TENSORS)
    peft.write(tmp_path / "c", peft.read(tmp_path / "b"), profile="vllm")
    assert_equal(models.read(tmp_path / "c" / TENSORS), tensors)
    pairs = (peft.load(x, case.base, case.names) for x in (case.folder, tmp_path / "c"))
    for one, two in zip(*(tree["experts"].values() for tree in pairs), strict=True):
        products = [x.scale * jnp.einsum("eir,ero->eio", x.a, x.b) for x in (one, two)]
        np.testing.assert_allclose(*products, atol=1e-6)


@every_case
def test_a_configuration_is_made(name: str, tmp_path: Folder) -> None:
    """The model takes what is written without the fields that choose."""
    case = models.case(name)
    contents = peft.read(case.folder)
    peft.write(tmp_path / "a", without(contents, *CHOOSING))
    expected = peft.load(case.folder, case.base, case.names)
    assert_equal(peft.load(tmp_path / "a", case.base, case.names), expected)


@every_case
def test_renamed(name: str, tmp_path: Folder) -> None:
    """Under other names, without `target_modules`, the configuration is made anew."""
    old = peft.read(models.FIXTURES / name)
    rename = lambda tree: {f"other.x{key}": x for key, x in tree.items()}  # noqa: E731
    tied = {key: f"other.x{head}" for key, head in rename(old.tied).items()}
    new = peft.Contents(rename(old.leaves), old.config, tied, rename(old.frozen))
    new = without(new, "target_modules")
    peft.write(tmp_path / "a", new)
    found = peft.read(tmp_path / "a")
    assert_equal(dict(found.leaves), dict(new.leaves))
    assert found.tied == new.tied
    assert_equal(dict(found.frozen), dict(new.frozen))


@pytest.mark.parametrize("view", [np.asfortranarray, lambda x: x[::-1], lambda x: x[:, ::2]])
def test_views_of_memory(view: Any, tmp_path: Folder) -> None:
    """The safetensors library would write the memory behind them, or what is after it."""
    x = view(np.arange(12, dtype=np.float32).reshape(3, 4))
    rows = Replaced(x, (1, 2, 3), Layout((), (0,), (1,)))
    peft.write(tmp_path / "a", peft.Contents({"m.q": Q, "m.e": rows, "m.p.weight": x}))
    found: Any = peft.read(tmp_path / "a").leaves
    np.testing.assert_array_equal(found["m.p.weight"], x)
    np.testing.assert_array_equal(found["m.e"].v, x)


def test_some_of_the_leaves(tmp_path: Folder) -> None:
    """Without `target_modules`, those that are there are named, and no others of the model."""
    case = models.case("all_linear")
    contents = peft.read(case.folder)
    some = {key: x for key, x in contents.leaves.items() if key.endswith("q_proj")}
    contents = without(dataclasses.replace(contents, leaves=some), "target_modules")
    assert peft.write(tmp_path / "a", contents)["target_modules"] == [*some]
    found = peft.load(tmp_path / "a", case.base, case.names)
    assert len(jax.tree.leaves(found)) == 2 * len(some)


def test_biases_of_what_is_adapted(tmp_path: Folder) -> None:
    """The rest of the model may have others."""
    contents = peft.Contents({"m.q": Q, "m.q.bias": np.ones(2, np.float32)})
    assert peft.write(tmp_path / "a", contents)["bias"] == "lora_only"
    assert_equal(dict(peft.read(tmp_path / "a").leaves), dict(contents.leaves))


def test_counted_batches(tmp_path: Folder) -> None:
    """A BatchNorm that is saved as a whole has an integer."""
    count = {"m.norm.num_batches_tracked": np.asarray(7)}
    folder = write(tmp_path / "a", pair("m.q", 1, 3, 2) | count, modules_to_save=["norm"])
    peft.write(tmp_path / "b", peft.read(folder))
    assert_equal(models.read(tmp_path / "b" / TENSORS), models.read(folder / TENSORS))


def test_rows_alone(tmp_path: Folder) -> None:
    """They are of LoRA of no module."""
    rows = Replaced(np.ones((2, 2), np.float32), (5, 6), Layout((), (0,), (1,)))
    fields = peft.write(tmp_path / "a", peft.Contents({"m.e0": rows}))
    assert fields["target_modules"] == "dummy-target-modules"
    assert fields["trainable_token_indices"] == {"m.e0": [5, 6]}
    assert_equal(dict(peft.read(tmp_path / "a").leaves), {"m.e0": rows})


Q = LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)), 1.0, Layout((), (1,), (0,)))
ROUTED = Routed(jnp.ones((2, 3, 1)), jnp.ones((2, 1, 2)), None, 2, 1.0, Layout((), (0,), (1,)))
AXES, NODE = Layout((), (0, 1), (2,)), r"{}: expected a node with the axes of PyTorch's weight"
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "axes": ({"m.q": Q.replace(layout=AXES)}, {}, NODE.format("m.q")),
    "another node": ({"m.q": ROUTED}, {}, NODE.format("m.q")),
    "no leaf": ({"m.q": 1.0}, {}, NODE.format("m.q") + r".*; got 1\.0"),
    "an array of no module": ({"q": np.ones(3)}, {}, NODE.format("q")),
    "nothing": ({}, {}, "has neither A and B nor a parameter in full"),
    "integers": ({"m.q.weight": np.ones((2, 3), int)}, {}, "expected a dtype of F64.*int64"),
    "shapes": ({"m.q": jax.eval_shape(lambda: Q)}, {}, "m.q: .*got jax.ShapeDtypeStruct"),
    "not finite": ({"m.q": Q.replace(a=Q.a * jnp.inf)}, {}, "3 of 3 values are not finite"),
    "a field": ({"m.q": Q}, {"bias": "x"}, "`contents` has a configuration .*\n.*bias: expected"),
    "a method": ({"m.q": Q}, {"peft_type": "TRAINABLE_TOKENS"}, "Leave peft_type out"),
    "a deep name": ({f"{'m.' * 101}q": Q}, {}, r"\.lora_A\.weight.*: expected at most 1000 print"),
    "both": ({"m.q": Q, "m.q.weight": np.ones((2, 3))}, {}, r"m\.q.* also has A and B"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Folder) -> None:
    leaves, config, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        peft.write(tmp_path / "a", peft.Contents(leaves, config))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_scales_for_vllm_are_rounded_once(dtype: Any, tmp_path: Folder) -> None:
    """With B, and not before."""
    b = jnp.linspace(1, 2, 64).astype(dtype)[None]
    adapter = Q.replace(a=jnp.ones((3, 1), dtype), b=b, scale=1 / 3)
    peft.write(tmp_path / "a", peft.Contents({"m.q": adapter}), "vllm")
    found: Any = peft.read(tmp_path / "a").leaves["m.q"]
    np.testing.assert_array_equal(found.b, (np.asarray(b, np.float32) / 3).astype(dtype))


@pytest.mark.parametrize(
    ("a", "b"), [((2, 6), (5, 3)), ((2, 6), (2, 5, 1)), ((2, 6, 3, 3), (5, 2, 3, 3))]
)
def test_a_and_b_of_two_ranks(a: Any, b: Any, tmp_path: Folder) -> None:
    """They are refused with the key, with a model or without one."""
    factors = zip(ENDS, (np.ones(a, np.float32), np.ones(b, np.float32)), strict=True)
    folder = write(tmp_path / "a", {f"q{end}": x for end, x in factors}, r=2)
    with pytest.raises(ValueError, match=r"q\.lora_B\.weight: expected 2 columns"):
        peft.read(folder)
    (tmp_path / "base").mkdir()
    save_file(
        {"q.weight": np.ones((b[0], *a[1:]), np.float32)}, tmp_path / "base" / "model.safetensors"
    )
    with pytest.raises(ValueError, match="`adapter` cannot be merged"):
        peft.export_merged(tmp_path / "base", folder, tmp_path / "out")
