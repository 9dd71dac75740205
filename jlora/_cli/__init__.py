"""The command line, `jlora`. Imports all of jlora."""

from ._app import main as main
