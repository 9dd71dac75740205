"""What a step needs. Imports `core`, `sharding`, `_compat`, `_policy`, `_table`, `_types`."""

from ._plan import Plan as Plan
from ._plan import plan as plan
