"""PEFT's files of rows of embeddings: what comes back, and what PEFT has no form for."""

from typing import Any

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from test_rows import IDS, NEW, normal

import jlora
from jlora import Rows, peft
from jlora.types import Replaced


@pytest.mark.parametrize(
    ("axes", "shape"), [("vo", (7, 4)), ("ov", (4, 7)), ("voo", (7, 2, 2)), ("ovo", (2, 7, 2))]
)
def test_through_pefts_files(axes: str, shape: tuple[int, ...], tmp_path: Any) -> None:
    """However the table lies, and what it is a multiple of: rows as PyTorch's table has them."""
    names = [peft.Name("t", "embed", axes, times=lambda shape: 0.5, interleaved=True)]
    at = axes.index("v")
    lora = jlora.transform(lambda p, i: jnp.take(p["t"], i, axis=at), Rows("t", NEW))
    base, adapter = lora.init(jax.random.key(0), {"t": normal(0, *shape)}, IDS)
    adapter = laws.randomize(adapter)
    peft.save(tmp_path / "a", base, adapter, names)
    again = peft.load(tmp_path / "a", base, names)
    assert jax.tree.structure(again) == jax.tree.structure(adapter)
    np.testing.assert_array_equal(again["t"].v, adapter["t"].v)
    [found] = peft.tensors(base, adapter, names).values()
    merged = peft.to_tensors(jlora.merge(base, adapter), names)["embed.weight"]
    np.testing.assert_allclose(found, merged[list(NEW)], rtol=1e-6, atol=1e-6)


def test_different_lists_alone_are_refused(tmp_path: Any) -> None:
    """PEFT has one list for all embeddings where there is nothing else."""
    names = [peft.Name("[uv]", r"m.\g<0>", "vo")]
    base = {"u": normal(0, 7, 4), "v": normal(1, 7, 4)}
    lora = jlora.transform(lambda p, i: p["u"][i] + p["v"][i], Rows("u", [1]), Rows("v", [2]))
    _, adapter = lora.init(jax.random.key(0), base, IDS)
    message = "`adapter` has nothing but rows, of which PEFT has one list for all embeddings; got "
    with pytest.raises(ValueError, match=message + "different ones at u, v. Save them one by one"):
        peft.save(tmp_path / "a", base, adapter, names)


def test_pefts_files_have_rows_of_embeddings_alone(tmp_path: Any) -> None:
    node = Replaced(normal(1, 3, 4), NEW, jlora.types.Layout((), (0,), (1,)))
    message = "  t: has rows of its own, but is no embedding by `names`"
    with pytest.raises(ValueError, match=message):
        peft.save(tmp_path / "a", {"t": normal(0, 7, 4)}, {"t": node}, [peft.Name("t", "t", "io")])
