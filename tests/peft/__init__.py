"""Tests of PEFT's files."""
