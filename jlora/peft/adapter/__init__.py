"""The files of a PEFT adapter: their configuration, the modules it selects, reading and writing.

Imports `_adapters`, `_arrays`, `_errors`, `_folders`, `_rules`, `_tree`, `_types`, `peft._file`,
`peft._problems`, `peft._recognized`, `peft._source`, `peft.names` and `peft.places`.
"""
