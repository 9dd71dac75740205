"""Tests of the name tables, each beside its library."""
