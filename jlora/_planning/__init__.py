"""What a step needs.

Imports `_core`, `sharding`, `_compat`, `_policy`, `_table`, `_tree`, `_types`.
"""

from ._plan import Plan as Plan
from ._plan import plan as plan
from ._topology import has_compiler as has_compiler
from ._topology import mesh_of as mesh_of
from ._topology import parse as parse
