"""Where the parameters of a model are stored in a checkpoint.

Imports `_errors` and `peft._vocabulary`.
"""
