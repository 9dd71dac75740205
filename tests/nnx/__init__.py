"""Tests of models of Flax NNX."""
