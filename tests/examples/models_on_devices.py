"""The models of `examples/models` on a mesh of eight devices.

Fully sharded × tensor parallel, with and without sequence parallelism.
"""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from laws import assert_close
from models import parts
from small import some

from tests.examples.test_models import ONE_EACH, SMALL

RULES = {name: getattr(parts, name) for name in ("RULES", "SEQUENCE_RULES")}
IDS = np.random.default_rng(0).integers(2, 61, (8, 8)).astype(np.int32)


@pytest.mark.parametrize("name", some(ONE_EACH, "gpt"))
@pytest.mark.parametrize("rules", some(RULES, "SEQUENCE_RULES"))
def test_on_a_mesh_is_as_on_one_device(name, rules):
    """With rules of either kind; no kernel lies everywhere."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 2)
    small = SMALL[name]
    rows = {"gpt": {"pad_vocab": 4}, "llama_untied": {"vocab": 64}}.get(name, {"vocab_size": 64})
    small = small._replace(config=dataclasses.replace(small.config, **rows))
    model = small.model(scan=True, remat=True)
    whole = small.variables(True)
    abstract = jax.eval_shape(model.init, jax.random.key(0), IDS)
    places = parts.shardings(abstract, mesh, RULES[rules])
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES[rules]):
        variables = jax.device_put(jax.device_get(whole), places)
        program = jax.jit(model.apply).lower(variables, IDS)
        actual = program.compile()(variables, IDS)
    assert_close(actual, jax.jit(model.apply)(whole, IDS))
    text = program.as_text()
    assert "sharding_constraint" in text or "@Sharding" in text
    kernels = [x.sharding for x in jax.tree.leaves(variables) if x.ndim > 2]
    assert len({x.spec for x in kernels}) >= 2
    assert not any(x.is_fully_replicated for x in kernels)
