"""The models of the examples, each in one file."""
