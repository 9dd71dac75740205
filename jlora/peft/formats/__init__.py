"""How checkpoints store weights in few bits: a file for each format.

A format says how the tensors of a module become codes and scales; `_stored` makes leaves of those.

Imports `_folders`, `_quantized`, `_rules`, `_tree`, `_types`, `sharding`, `peft._checkpoint`,
`peft._file`, `peft.names`.
"""

from . import _awq, _bitsandbytes, _compressed_tensors, _fp8, _gptq, _mxfp4  # noqa: F401
from ._format import FORMATS as FORMATS
from ._format import Format as Format
from ._stored import Dense as Dense
from ._stored import Stored as Stored
from ._stored import array_of as array_of
from ._stored import check_finite as check_finite
from ._stored import leaf_of as leaf_of
from ._tensors import FLOATS as FLOATS
from ._tensors import Tensors as Tensors
from ._tensors import Unreadable as Unreadable
from ._tensors import left_of as left_of
