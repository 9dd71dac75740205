"""Formats of quantized checkpoints, a class each.

A format reads the tensors of a module as codes and scales. `_codes` makes leaves from these.

Imports `_arrays`, `_errors`, `_folders`, `_progress`, `_quantized`, `_tree`, `_types`,
`peft._changed`, `peft._checkpoint`, `peft._file`, `peft._recognized`, `peft._write`, `peft.names`,
`peft.places` and `sharding`.
"""

from . import _affine, _bitsandbytes, _compressed_tensors, _fp8, _mxfp4  # noqa: F401
