"""`examples/chat.py` on eight devices: weights and rows are sharded, codes of 4 bits too."""

import dataclasses

import chat
import jax
import pytest

import jlora
from tests.examples.folders import (
    run_on_eight_and_on_one,
    write_chat_model,
    write_conversations,
)
from tests.examples.test_llama import TINY

WIDE = dataclasses.replace(TINY, dim=512, hidden=512, heads=8, kv_heads=8, layers=1)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--quantize=nf4"], ["--accumulate=2"]])
def test_eight_devices_are_one(more, tmp_path, monkeypatch):
    """The same losses but for rounding, and no kernel is whole on a device."""
    bases, given = [], jlora.transform

    def transform(apply, *rules):
        lora = given(apply, *rules)

        def init(key, variables, *args):
            bases.append(variables)
            return lora.init(key, variables, *args)

        return dataclasses.replace(lora, init=init)

    monkeypatch.setattr(jlora, "transform", transform)
    write_chat_model(tmp_path / "out" / "smollm2", WIDE)  # to be shared in blocks of 64 inputs
    monkeypatch.chdir(tmp_path)
    data = write_conversations(tmp_path / "data.jsonl", 4)
    sizes = ["--batch=8", "--length=64", "--steps=3", "--held-out=8", *more]
    with jax.enable_x64(False):
        run_on_eight_and_on_one(chat.main, [f"--data={data}", *sizes], tmp_path, monkeypatch)
    kernels = [x for x in jax.tree.leaves(bases[0]["params"]["layers"]) if x.ndim > 2]
    assert len(kernels) >= 7 and not any(x.sharding.is_fully_replicated for x in kernels)
