"""Tests of sketches and ranks from them."""
