"""Statistics of sites, and ranks that are allocated by them.

Imports `_adapters`, `_arrays`, `_errors`, `_keys`, `_linalg`, `_progress`, `_rules`, `_site`,
`_text`, `_transform`, `_tree`, `_types`.

Read the modules in this order: `_kinds`, `_sketch`, `_allocate`.
"""

from ._allocate import allocate as allocate
from ._kinds import Sketch as Sketch
from ._kinds import Spectrum as Spectrum
from ._sketch import sketch as sketch
