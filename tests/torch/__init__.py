"""Tests of models of PyTorch."""
