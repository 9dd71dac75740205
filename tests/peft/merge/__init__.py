"""Tests of merged checkpoints."""
