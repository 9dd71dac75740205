"""Methods of PEFT's that are LoRA for some A and B, a file each. Imports nothing of jlora."""

from ._adalora import ADALORA
from ._lokr import LOKR
from ._miss import MISS
from ._other import Form as Form
from ._other import Other as Other
from ._vera import VERA

OTHERS: dict[str, Other] = {"ADALORA": ADALORA, "LOKR": LOKR, "MISS": MISS, "VERA": VERA}
