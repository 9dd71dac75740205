"""Tests of measures of adapters."""
