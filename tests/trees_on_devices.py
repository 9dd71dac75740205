"""Trees whose leaves lie on a mesh of four devices: `init`, `merge`, and masks of dropout."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import assert_lies, mesh_of, put
from small import set_up

import jlora
from jlora import peft
from tests.test_trees import KEY, assert_close, random, setup

MESH = mesh_of(shape=(2, 2), names=("data", "model"))


@pytest.fixture(autouse=True)
def float32() -> Iterator[None]:
    """The numbers of `test_trees`."""
    with jax.enable_x64(False):
        yield


def placed() -> tuple[Any, Any]:
    """The dict model, and its parameters with `up` over both axes, `down` over one."""
    s = setup()
    return s, put(s.params, MESH, {"up": P("data", "model"), "down": P(None, "model")})


def test_merge_keeps_shardings() -> None:
    """Eagerly, back, compiled, and for an adapter that is on the mesh or on one device."""
    s, params = placed()
    everywhere = jax.device_put(s.adapter, NamedSharding(MESH, P()))
    places = jax.tree.map(lambda x: x.sharding, params)
    for adapter in (s.adapter, everywhere):
        merged = jlora.merge(params, adapter)
        assert_lies((merged, jlora.unmerge(merged, adapter)), (params, params))
        assert_close(merged, jlora.merge(s.base, s.adapter), 1e-10)
    assert_lies(jax.jit(jlora.merge, out_shardings=places)(params, everywhere), params)


def test_trees_keep_shardings() -> None:
    """The base is the user's; leaves in full lie as they do, also from an adapter on the host."""
    s, params = placed()
    _, base, adapter = set_up(s.f, (jlora.LoRA("up", rank=2), jlora.Full("down")), params, s.x)
    assert all(base[name] is params[name] for name in base)
    assert_lies(adapter["down"], params["down"])
    assert_lies(jlora.merge(base, jax.tree.map(np.asarray, adapter)), params)
    assert_close(
        jax.jit(s.lora.apply)(params, s.adapter, s.x), s.lora.apply(*setup()[4:], s.x), 1e-5
    )


def test_merge_does_not_commit_to_a_device() -> None:
    """Parameters that follow their data still do so when merged."""
    s = setup()
    x = jax.device_put(jnp.ones((4, 6)), NamedSharding(MESH, P("data")))
    assert not s.params["up"].committed
    jax.jit(s.f)(s.params, x)
    jax.jit(s.f)(jlora.merge(s.base, s.adapter), x)


@pytest.mark.parametrize(("check", "masks"), [(True, 4), (False, 2)])
def test_dropout_masks_differ_by_shard(check: bool, masks: int) -> None:
    """Four rows on two devices, in a `shard_map`; unchecked, the devices have the same masks."""
    product = jax.shard_map(
        lambda w, x: x @ w,
        mesh=MESH,
        in_specs=(P(), P("data")),
        out_specs=P("data"),
        check_vma=check,
    )
    rule, x = jlora.LoRA("w", rank=2, dropout=0.5, init=random), jnp.ones((4, 64))
    lora, base, adapter = set_up(lambda p, x: product(p["w"], x), rule, {"w": jnp.ones((64, 4))}, x)
    rows = np.asarray(jax.jit(lora.apply)(base, jlora.dropout(adapter, KEY), x))
    assert len({row.tobytes() for row in rows}) == masks


def test_files_under_a_mesh(tmp_path: Path) -> None:
    """Those that are merged are those without one; what is read lies on all of its devices."""
    names = [peft.Name(r"(\w+)/kernel", r"\1", "io")]
    params = {"up": {"kernel": np.ones((16, 8), np.float32)}}
    lora = jlora.transform(lambda p, x: x @ p["up"]["kernel"], jlora.LoRA(rank=2))
    base, adapter = lora.init(KEY, params, jnp.ones((1, 16)))
    peft.save_base(tmp_path / "base", base, names)
    adapter = jax.tree.map(lambda x: x + 0.5, adapter)
    peft.export_merged(tmp_path / "base", adapter, tmp_path / "alone", names=names)
    with jax.set_mesh(MESH):
        peft.export_merged(tmp_path / "base", adapter, tmp_path / "mesh", names=names)
        peft.save(tmp_path / "adapter", base, adapter, names)
        read = peft.load(tmp_path / "adapter", base, names)
    assert_lies(read, jax.tree.map(lambda x: jax.device_put(x, NamedSharding(MESH, P())), read))
    assert_close(read, adapter, 0)
    one, other = (tmp_path / name / "model.safetensors" for name in ("alone", "mesh"))
    assert one.read_bytes() == other.read_bytes()
