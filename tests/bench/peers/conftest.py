"""Keeps pytest out: most of these modules import what only a peer's own environment has."""

collect_ignore_glob = ["*.py"]
