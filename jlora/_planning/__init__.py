"""The memory of a training step: what it needs, and a policy by which it needs less.

Imports `sharding`, `_report`, `_tree`, `_types`.
"""

from ._plan import Plan as Plan
from ._plan import plan as plan
from ._policy import checkpoint_policy as checkpoint_policy
from ._topology import has_compiler as has_compiler
from ._topology import mesh_of as mesh_of
from ._topology import parse as parse
