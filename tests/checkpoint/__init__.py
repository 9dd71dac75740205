"""Tests of Orbax's files."""
