"""PEFT's files of DoRA: what comes back, what is merged, and what PEFT has no form for."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from peft_files import assert_close, assert_equal
from safetensors.numpy import load_file
from test_dora import scanned

import jlora
from jlora import DoRA, Slots, peft
from jlora.types import Decomposed

W = np.random.default_rng(0).standard_normal((3, 8, 6)).astype(np.float32)
NAMES = [peft.Name("w", r"w.{}", "lio"), peft.Name("v", "v", "io"), peft.Name("e", "e", "eio", "e")]


@pytest.fixture
def made() -> tuple[Any, Any]:
    """Base and random adapter of three matrices in a stack."""
    rule = DoRA("w", rank=2, alpha=3)
    return start(scanned, rule, {"w": jnp.asarray(W)}, jnp.ones((3, 5, 8)))


def come_back(folder: Any, base: Any, adapter: Any, names: Any) -> Any:
    """The adapter after `save` and `load`, the same in every bit."""
    peft.save(folder, base, adapter, names)
    again = peft.load(folder, base, names)
    assert_equal(again, adapter)
    return again


def start(f: Any, rule: Any, params: Any, *inputs: Any) -> tuple[Any, Any]:
    """Base and random adapter."""
    base, adapter = jlora.transform(f, rule).init(jax.random.key(0), params, *inputs)
    return base, laws.randomize(adapter)


def test_a_stack_goes_through_pefts_files(made: Any, tmp_path: Any) -> None:
    """Each layer is a module, with its own magnitudes; all slots of a module are its outputs."""
    assert come_back(tmp_path / "a", *made, NAMES)["w"].m.shape == (3, 6)
    rule = DoRA("w", rank=2, alpha=3, rslora=True, slots=Slots(3, (2, 0, 1)))
    base, adapter = start(scanned, rule, {"w": jnp.asarray(W)}, jnp.ones((3, 5, 8)))
    peft.save(tmp_path / "b", base, adapter, NAMES)
    assert peft.read_config(tmp_path / "b")["use_dora"] is True
    tensors = peft.tensors(base, adapter, NAMES)
    assert tensors["base_model.model.w.1.lora_magnitude_vector"].shape == (6,)
    again = peft.load(tmp_path / "b", base, NAMES)
    assert_close(jlora.merge(base, again), jlora.merge(base, adapter))


def test_modules_that_are_slots_have_their_own(tmp_path: Any) -> None:
    """A leaf of several modules, of which some are adapted: (k and v, heads, d, head_dim)."""
    f = lambda p, x: jnp.einsum("bi,soih->bsoh", x, p["kv"])  # noqa: E731
    params = {"kv": jnp.asarray(W.reshape(2, 3, 8, 3))}
    base, adapter = start(f, DoRA("kv", 2, slots=Slots(2, (1,))), params, jnp.ones((5, 8)))
    come_back(tmp_path / "a", base, adapter, [peft.Name("kv", ("k", "v"), "soio")])


def test_parts_of_a_parameter_and_a_multiple(tmp_path: Any) -> None:
    """Both parts have magnitudes in one vector; PyTorch's are those of its own weight."""
    names = [
        peft.Name("gate", "up", "io", part=(0, 2)),
        peft.Name("up", "up", "io", part=(1, 2)),
        peft.Name("down", "down", "io", times=lambda shape: 0.5),
    ]
    params = {"gate": W[0], "up": W[1], "down": W[2].T}
    f = lambda p, x: jax.nn.silu(x @ p["gate"]) * (x @ p["up"]) @ p["down"]  # noqa: E731
    base, adapter = start(f, DoRA(rank=2), params, jnp.ones((1, 8)))
    peft.save(tmp_path / "a", base, adapter, names)
    again = peft.load(tmp_path / "a", base, names)
    for name, node in adapter.items():
        assert_close((again[name].m, again[name].b), (node.m, node.b), 1e-6)
    tensors = peft.tensors(base, adapter, names)
    of_down = tensors["base_model.model.down.lora_magnitude_vector"]
    np.testing.assert_allclose(of_down, np.asarray(adapter["down"].m) / 0.5, rtol=1e-6)
    del adapter["gate"]
    message = "up: has magnitudes for 1 of the 2 parts of up.weight, PEFT for all"
    with pytest.raises(ValueError, match=message):
        peft.save(tmp_path / "b", base, adapter, names)


def test_merged_into_a_checkpoint(made: Any, tmp_path: Any) -> None:
    """By columns or by rows, in blocks of any size, from the tree and from its files."""
    base, adapter = made
    for kind, axes in {"linear": "lio", "turned": "lio"}.items():
        names = [peft.Name("w", r"w.{}", axes, transposed=kind == "turned")]
        folder = tmp_path / kind
        peft.save_base(folder / "base", base, names)
        peft.save(folder / "adapter", base, adapter, names)
        peft.export_merged(folder / "base", folder / "adapter", folder / "files")
        peft.export_merged(folder / "base", adapter, folder / "tree", names=names)
        merged, same = (load_file(folder / x / "model.safetensors") for x in ("files", "tree"))
        expected = np.asarray(jlora.merge(base, adapter)["w"])
        for i, w in enumerate(expected):
            x = merged[f"w.{i}.weight"]
            np.testing.assert_array_equal(x, same[f"w.{i}.weight"])
            np.testing.assert_allclose(x if kind == "turned" else x.T, w, rtol=1e-5, atol=2e-6)


def refused(tmp_path: Any, adapter: Any, base: Any, names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        peft.save(tmp_path / "p", base, adapter, names)
    assert not list(tmp_path.iterdir())


def test_what_peft_has_not_is_refused_by_name(made: Any, tmp_path: Any) -> None:
    base, adapter = made
    node = adapter["w"]
    slots = jlora.transform(scanned, DoRA("w", rank=2, slots=Slots(3, (2, 0))))
    _, some = slots.init(jax.random.key(0), base, jnp.ones((3, 5, 8)))
    message = "  w: has magnitudes for the slots (2, 0) alone, PEFT for all 3"
    refused(tmp_path, some, base, NAMES, message)
    zero = {"w": node._replace(m=jnp.zeros_like(node.m))}
    refused(tmp_path, zero, base, NAMES, "  w: has magnitudes that are all 0")
    message = "  e: is a Decomposed, and of a parameter of experts PEFT has LoRA alone"
    refused(tmp_path, {"e": node}, {"e": base["w"]}, NAMES, message)
    layout = jlora.types.Layout((), (0, 1), (2,))
    whole = Decomposed(jnp.ones((3, 8, 1)), jnp.ones((1, 6)), jnp.ones(6), 1.0, layout)
    message = "  w: has norms over (0, 1), PEFT over (1,)"
    refused(tmp_path, {"w": whole}, base, NAMES, message)


def test_a_mixed_adapter_is_refused_with_all_paths_but_merged(made: Any, tmp_path: Any) -> None:
    base, adapter = made
    base = base | {"v": base["w"][0]}
    low = jlora.types.LowRank(
        jnp.ones((8, 1)), jnp.ones((1, 6)), 1.0, jlora.types.Layout((), (0,), (1,))
    )
    message = (
        "`adapter` has DoRA at some sites and LoRA at others; PEFT has one of them for all "
        "(`use_dora`):\n  LowRank: v\n  Decomposed: w\nMerge it into the model: "
        "jlora.peft.export_merged, or jlora merge."
    )
    refused(tmp_path, adapter | {"v": low}, base, NAMES, message)
    peft.save_base(tmp_path / "base", base, NAMES)
    both = adapter | {"v": low}
    peft.export_merged(tmp_path / "base", both, tmp_path / "out", names=NAMES)
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), jlora.merge(base, both)
    np.testing.assert_allclose(found["v.weight"].T, expected["v"], rtol=1e-6)
    np.testing.assert_allclose(found["w.1.weight"].T, expected["w"][1], rtol=1e-5, atol=2e-6)


def test_a_tied_embedding_is_refused(tmp_path: Any) -> None:
    """Its head is normed over its rows in PEFT, and over its columns here."""
    names = [peft.Name("embed", "embed", "vo", tied="head")]
    dora = jlora.transform(lambda p, i: p["embed"][i] @ p["embed"].T, DoRA("embed", rank=2))
    base, adapter = dora.init(jax.random.key(0), {"embed": jnp.asarray(W[0])}, jnp.array([1]))
    message = (
        "`adapter` has DoRA at an embedding that the head shares, where PEFT has norms of its "
    )
    refused(tmp_path, adapter, base, names, message + "own for each of the two:\n  embed: head\n")


def test_the_profile_of_vllm_is_refused(made: Any, tmp_path: Any) -> None:
    base, adapter = made
    message = "`profile` 'vllm' takes LoRA of linear and embedding sites alone; got\n  w.0: of DoRA"
    with pytest.raises(ValueError, match=message):
        peft.save(tmp_path / "p", base, adapter, NAMES, profile="vllm")


def test_dropout_of_a_file_is_told(made: Any, tmp_path: Any) -> None:
    """It is of training alone; the configuration keeps it."""
    base, adapter = made
    peft.save(tmp_path / "a", base, adapter, NAMES, config={"lora_dropout": 0.1})
    with pytest.warns(UserWarning, match="lora_dropout: 0.1 is of training alone"):
        again = peft.load(tmp_path / "a", base, NAMES)
    config = peft.read_config(tmp_path / "a")
    peft.save(tmp_path / "b", base, again, NAMES, config=config)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
