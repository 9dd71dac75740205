"""Merges an adapter into a checkpoint.

Imports `_adapters`, `_errors`, `_folders`, `_tree`, `_types`, `peft._changed`, `peft._checkpoint`,
`peft._file`, `peft._problems`, `peft._recognized`, `peft._submodels`, `peft._write`,
`peft.adapter`, `peft.formats`, `peft.names` and `peft.places`.
"""
