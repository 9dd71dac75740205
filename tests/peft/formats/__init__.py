"""Tests of quantized checkpoints."""
