"""How checkpoints store weights in few bits: a file for each format.

A format makes codes and scales of the tensors of a module; `_codes` makes leaves of those.

Imports `_folders`, `_progress`, `_quantized`, `_tree`, `_types`, `sharding`, `peft._checkpoint`,
`peft._file`, `peft._vocabulary`, `peft._write`, `peft.names`.
"""

from . import _awq, _bitsandbytes, _compressed_tensors, _fp8, _gptq, _mxfp4  # noqa: F401
