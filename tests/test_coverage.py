"""The coverage table: what must be exact, and the tests that show it.

Rows 1 to 13 and 15 are cases of the tables in `cases`, each under every law of `test_laws`. What a
row asks for beyond the laws is named here and must exist.
"""

import ast
import pathlib

import pytest
from cases import CASES, all_cases

ROWS = {
    1: "linen Dense, DenseGeneral, Einsum, attention",
    2: "raw products, transposes, dtype mixes",
    3: "a helper under the user's own jit, already traced",
    4: "scanned and checkpointed layers, linen and NNX",
    5: "NNX layers through split and merge, other variable kinds",
    6: "lookups, tied embeddings, one weight used twice",
    7: "convolutions of every kind, recurrent cells",
    8: "fused kernels, slots",
    9: "mixtures of experts, ragged_dot",
    10: "methods, mutable collections, rngs, flags, Python control flow",
    11: "custom_jvp, custom_vjp, loops, branches, shard_map",
    12: "no false positive",
    13: "containers of parameters, abstract leaves",
    15: "whole models of transformers",
}

BEYOND = {
    2: ["test_random.py::test_random_products"],
    11: ["test_errors.py"],
    13: ["test_trees.py"],
    14: ["test_dropout.py"],
    15: ["test_bert.py", "test_llama.py", "test_quickstart.py"],
}


@pytest.mark.parametrize("row", ROWS)
def test_row_has_cases(row: int) -> None:
    """Every row is covered by at least two cases."""
    assert len(all_cases(row)) >= 2, ROWS[row]


def test_names_are_unique() -> None:
    """A name is a pytest id."""
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("name", sorted({name for names in BEYOND.values() for name in names}))
def test_beyond_exists(name: str) -> None:
    """The files and functions that the table names are there."""
    file, _, function = name.partition("::")
    tree = ast.parse((pathlib.Path(__file__).parent / file).read_text())
    functions = [x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]
    assert function in functions if function else any(f.startswith("test_") for f in functions)
