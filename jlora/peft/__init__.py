"""PEFT's files.

Imports `_folders`, `_rules`, `_tree`, `_types`, `_untrusted`, `adapters`, `quantized`, `sharding`.

adapter = peft.load("adapter", base, peft.LLAMA)
peft.save("copy", base, adapter, peft.LLAMA, config=peft.read_config("adapter"))
"""

from ._alone import read as read
from ._base import load_base as load_base
from ._base import save_base as save_base
from ._check import Checked as Checked
from ._check import check as check
from ._checkpoint import holds as holds
from ._combine import combine as combine
from ._config import read_config as read_config
from ._export import export_merged as export_merged
from ._load import load as load
from ._matrices import Matrix as Matrix
from ._matrices import matrices as matrices
from ._names import Name as Name
from ._rewrite import dequantize_checkpoint as dequantize_checkpoint
from ._rewrite import quantize_checkpoint as quantize_checkpoint
from ._save import convert as convert
from ._save import save as save
from ._save import tensors as tensors
from ._to_lora import to_lora as to_lora
from ._weights import from_tensors as from_tensors
from ._weights import to_tensors as to_tensors
from .engines import ENGINES as ENGINES
from .engines import Finding as Finding
from .tables import TABLES as TABLES
from .tables.transformers import BERT as BERT
from .tables.transformers import GPT2 as GPT2
from .tables.transformers import LLAMA as LLAMA
from .tables.transformers import LLAMA_SCANNED as LLAMA_SCANNED
from .tables.transformers import ROBERTA as ROBERTA
from .tables.transformers import VIT as VIT
