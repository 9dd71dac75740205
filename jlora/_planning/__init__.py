"""Computes the memory that a training step needs; a policy and options that make it cost less.

Imports `_arrays`, `_compat`, `_errors`, `_progress`, `_text`, `_tree`, `_types`, `sharding`.
"""

from ._mesh import has_compiler as has_compiler
from ._mesh import mesh_of as mesh_of
from ._mesh import mesh_of_leaves as mesh_of_leaves
from ._mesh import parse_topology as parse_topology
from ._options import compiler_options as compiler_options
from ._plan import Plan as Plan
from ._plan import plan as plan
from ._policy import remat_policy as remat_policy
