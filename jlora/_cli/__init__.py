"""The command line: `jlora inspect`, `merge`, `convert` and `diff`."""

from ._app import main as main
