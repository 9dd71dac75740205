"""Tests of names of leaves."""
