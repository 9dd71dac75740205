"""`examples/chat.py` on eight devices: weights and rows are sharded, codes of 4 bits too."""

import dataclasses
import json

import chat
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases._case import fill
from models import llama, smollm2
from test_llama import TINY, say, write_gguf

import jlora

WIDE = dataclasses.replace(TINY, dim=512, hidden=512, heads=8, kv_heads=8, layers=1)


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    """A model that eight devices can share in blocks of 64 inputs, and a few conversations."""
    folder = tmp_path_factory.mktemp("wide")
    file = write_gguf(folder / "wide.gguf", WIDE, fill(llama.shapes(WIDE), jnp.float32, 0.05))
    found = [say(f"Next to {c}?", chr(ord(c) + 1)) for c in "abcdefghijklm" * 4]
    lines = [json.dumps({"messages": x}) + "\n" for x in found]
    (folder / "data.jsonl").write_text("".join(lines))
    base = smollm2.write(file, folder / "base")
    return [f"--base={base}", f"--data={folder / 'data.jsonl'}", *["--batch=8", "--length=64"]]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--quantize=nf4"]])
def test_eight_devices_are_one(argv, more, tmp_path, monkeypatch):
    """The same losses but for rounding, and no kernel is whole on a device."""
    options, bases, quantized = ["--steps=3", "--held-out=8", *more], [], jlora.transform

    def transform(apply, *rules):
        lora = quantized(apply, *rules)

        def init(key, variables, *args):
            bases.append(variables)
            return lora.init(key, variables, *args)

        return dataclasses.replace(lora, init=init)

    monkeypatch.setattr(jlora, "transform", transform)
    with jax.enable_x64(False):
        eight = chat.main([*argv, *options, f"--out={tmp_path / 'eight'}"])
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        monkeypatch.setattr(
            jax,
            "make_mesh",
            lambda shape, *args, m=jax.make_mesh: m(shape, *args, devices=jax.devices()[:1]),
        )
        one = chat.main([*argv, *options, f"--out={tmp_path / 'one'}"])
    np.testing.assert_allclose(eight.losses, one.losses, rtol=1e-3)
    assert eight.after == pytest.approx(one.after, rel=1e-3)
    kernels = [x for x in jax.tree.leaves(bases[0]["params"]["layers"]) if x.ndim > 2]
    assert len(kernels) >= 7 and not any(x.sharding.is_fully_replicated for x in kernels)
