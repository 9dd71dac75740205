"""Reads and writes PEFT's files.

Imports `_adapters`, `_arrays`, `_errors`, `_folders`, `_progress`, `_quantized`, `_rules`, `_site`,
`_tree`, `_types` and `sharding`.

adapter = peft.load("adapter", base, peft.TABLES["llama"])
peft.save("copy", base, adapter, peft.TABLES["llama"], config=peft.read("adapter").config)
peft.write("served", peft.read("adapter"), profile="vllm")
peft.save("style.safetensors", base, adapter, names, dialect="diffusers", prefix="unet")
"""

from ._check_sites import check_sites as check_sites
from ._contents import Contents as Contents
from ._contents import read as read
from ._contents import write as write
from ._load import load as load
from ._save import save as save
from ._save import tensors as tensors
from .adapter._draft import DIALECTS as DIALECTS
from .engines import ENGINES as ENGINES
from .engines._check import Checked as Checked
from .engines._check import check as check
from .formats._dequantize import Matrix as Matrix
from .formats._dequantize import dequantize_checkpoint as dequantize_checkpoint
from .formats._load_base import load_base as load_base
from .formats._load_base import save_base as save_base
from .merge._export import export_merged as export_merged
from .names import tables as tables
from .names._by_value import Found as Found
from .names._by_value import find_names as find_names
from .names._names import Name as Name
from .names._weights import from_tensors as from_tensors
from .names._weights import to_tensors as to_tensors
from .names.tables import TABLES as TABLES
