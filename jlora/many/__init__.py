"""Many adapters on one base. Imports `_alike`, `_tree`, `_types`, `adapters`, `core`.

A table is an adapter with a leading axis of slots on each of its arrays.
"""

from ._route import prepare as prepare
from ._route import route as route
from ._table import insert as insert
from ._table import remove as remove
from ._table import stack as stack
from ._table import take as take
