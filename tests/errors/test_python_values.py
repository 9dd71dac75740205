"""Python code in the model that asks for the value of a leaf."""

import os

import jax.numpy as jnp
import numpy as np
import pytest
from small import SQUARE, W, X, assert_same, dense, init, message_of

import jlora
from jlora import LoRA

PYTHON_VALUES = {
    "int": ({"heads": 2}, lambda p, x: (x @ p["w"]).reshape(p["heads"], -1)),
    "bool": ({"flag": True}, lambda p, x: x @ p["w"] if p["flag"] else x),
    "vector": ({"gate": jnp.ones(1)}, lambda p, x: x @ p["w"] if p["gate"][0] > 0 else x),
    "float": ({"scale": jnp.float32(2)}, lambda p, x: x @ p["w"] * float(p["scale"])),
    "numpy": ({"mask": np.eye(4, 6)}, lambda p, x: x @ (p["w"] * np.asarray(p["mask"]))),
}


@pytest.mark.parametrize("case", list(PYTHON_VALUES))
def test_python_reads_a_leaf_that_is_not_adapted(case: str) -> None:
    """Leaves that no rule takes keep their values, as `apply` keeps them."""
    extra, apply = PYTHON_VALUES[case]
    materialize = case == "numpy"
    base, adapter = init(LoRA("w", rank=2, materialize=materialize), apply=apply, params=W | extra)
    actual = jlora.transform(apply).apply(base, adapter, X)
    assert_same(actual, apply(W | extra, X))


BRANCHES = {
    "weight": lambda p, x: x @ p["w"] if p["w"].sum() > 0 else x,
    "activation": lambda p, x: x @ p["w"] if (x @ p["w"]).sum() > 0 else x,
    "numpy": lambda p, x: x @ np.asarray(p["w"]),
    "float": lambda p, x: x @ p["w"] * float(p["w"][0, 0]),
}


@pytest.mark.parametrize("case", list(BRANCHES))
def test_python_reads_an_adapted_weight(case: str) -> None:
    """Python code that asks for the value of an adapted weight is refused, by both."""
    apply = BRANCHES[case]
    text = message_of(lambda: init(LoRA("w", rank=2), apply=apply, params=SQUARE))
    assert "asks in Python for the value" in text and "'w'" in text
    assert os.path.dirname(jlora.__file__) not in text  # no line of jlora
    base, adapter = init(LoRA("w", rank=2), apply=dense, params=SQUARE)
    with pytest.raises(TypeError, match="asks in Python for the value"):
        jlora.transform(apply).apply(base, adapter, X)
