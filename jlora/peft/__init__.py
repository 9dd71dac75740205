"""Reads and writes PEFT's files.

Imports `_adapters`, `_arrays`, `_errors`, `_folders`, `_progress`, `_quantized`, `_rules`, `_site`,
`_tree`, `_types` and `sharding`.

adapter = peft.load("adapter", base, peft.LLAMA)
peft.save("copy", base, adapter, peft.LLAMA, config=peft.read_config("adapter"))
peft.write("served", peft.read("adapter"), profile="vllm")
peft.save("style.safetensors", base, adapter, names, dialect="diffusers", prefix="unet")
"""

from ._checkpoint import holds as holds
from ._contents import Contents as Contents
from ._contents import read as read
from ._contents import write as write
from ._load import load as load
from ._save import save as save
from ._save import tensors as tensors
from .adapter._config import read_config as read_config
from .adapter._draft import DIALECTS as DIALECTS
from .engines import ENGINES as ENGINES
from .engines import Finding as Finding
from .engines._check import Checked as Checked
from .engines._check import check as check
from .formats._dequantize import Matrix as Matrix
from .formats._dequantize import dequantize_checkpoint as dequantize_checkpoint
from .formats._dequantize import matrices as matrices
from .formats._load_base import load_base as load_base
from .formats._load_base import save_base as save_base
from .merge._export import export_merged as export_merged
from .names import tables as tables
from .names._by_value import find_names as find_names
from .names._names import Name as Name
from .names._weights import from_tensors as from_tensors
from .names._weights import to_tensors as to_tensors
from .names.tables import TABLES as TABLES
from .names.tables.transformers import BERT as BERT
from .names.tables.transformers import GPT2 as GPT2
from .names.tables.transformers import LLAMA as LLAMA
from .names.tables.transformers import LLAMA_SCANNED as LLAMA_SCANNED
from .names.tables.transformers import ROBERTA as ROBERTA
from .names.tables.transformers import VIT as VIT
