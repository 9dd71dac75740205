"""The command line: what `jlora --help` lists. Imports all of jlora."""

from ._app import main as main
