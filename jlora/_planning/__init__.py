"""The memory that a training step needs, and a policy that saves some of it.

Imports `sharding`, `_report`, `_tree`, `_types`.
"""

from ._plan import Plan as Plan
from ._plan import plan as plan
from ._policy import checkpoint_policy as checkpoint_policy
from ._topology import has_compiler as has_compiler
from ._topology import mesh_of as mesh_of
from ._topology import parse as parse
