"""Tests of tables of adapters."""
