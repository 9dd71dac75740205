"""Tests of sums of adapters."""
