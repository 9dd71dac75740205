"""LoRA as a pure functional transform for JAX and Flax.

lora = jlora.transform(model.apply, jlora.LoRA(r"(query|value)/kernel", rank=8, alpha=16))
base, adapter = lora.init(key, variables, tokens)
logits = lora.apply(base, adapter, tokens)
params = jlora.merge(base, adapter)

`jlora.analysis`, `checkpoint`, `keras`, `many`, `nnx`, `peft` and `torch` are imported when they
are first used.
"""

import typing as _typing

from . import arithmetic as arithmetic
from . import extend as extend
from . import initializers as initializers
from . import sharding as sharding
from . import types as types
from ._adapters import DoRA as DoRA
from ._adapters import LoRA as LoRA
from ._adapters import Rows as Rows
from ._merge import merge as merge
from ._merge import unmerge as unmerge
from ._optimizer import labels as labels
from ._optimizer import mask as mask
from ._optimizer import optimizer as optimizer
from ._planning import compiler_options as compiler_options
from ._planning import plan as plan
from ._planning import remat_policy as remat_policy
from ._quantize import quantize as quantize
from ._quantized import FP4 as FP4
from ._quantized import FP8 as FP8
from ._quantized import MXFP4 as MXFP4
from ._quantized import NF4 as NF4
from ._quantized import Int4 as Int4
from ._quantized import Int8 as Int8
from ._quantized import Quantized as Quantized
from ._quantized import dequantize as dequantize
from ._report import summary as summary
from ._rules import Slots as Slots
from ._scaling import lora_plus as lora_plus
from ._scaling import precondition as precondition
from ._site import Frozen as Frozen
from ._site import Full as Full
from ._sketching import allocate as allocate
from ._sketching import sketch as sketch
from ._transform import dropout as dropout
from ._transform import transform as transform
from ._transform import wrap as wrap
from ._tree import bind as bind
from ._tree import count as count
from ._types import Params as Params

if _typing.TYPE_CHECKING:
    from . import analysis as analysis
    from . import checkpoint as checkpoint
    from . import keras as keras
    from . import many as many
    from . import nnx as nnx
    from . import peft as peft
    from . import torch as torch

    __version__: str

_LATER = ("analysis", "checkpoint", "keras", "many", "nnx", "peft", "torch")


def __getattr__(name: str) -> _typing.Any:
    import importlib
    from importlib import metadata

    if name in _LATER:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "__version__":
        try:
            return metadata.version(__name__)
        except metadata.PackageNotFoundError as e:
            raise AttributeError("jlora has no `__version__`: it is not installed") from e
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    public = {name for name in globals() if not name.startswith("_")}
    return sorted({*public, *_LATER, "__version__"})
