"""A merged checkpoint from a checkpoint and an adapter.

Imports `_adapters`, `_folders`, `_progress`, `_tree`, `_types`, `peft._checkpoint`, `peft._file`,
`peft._problems`, `peft.adapter`, `peft.formats`, `peft.names`.
"""
