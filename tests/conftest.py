"""Puts `examples/` on the path, so that tests import the examples as their own scripts do."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
