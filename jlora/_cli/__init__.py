"""The command line: `jlora inspect`, `merge`, `convert`, `diff`, `plan`. Imports all of jlora."""

from ._app import main as main
