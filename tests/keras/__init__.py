"""Tests of models of Keras."""
