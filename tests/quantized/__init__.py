"""Tests of quantized bases."""
