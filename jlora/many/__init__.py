"""Serves and trains many adapters on one base.

Imports `_adapters`, `_arrays`, `_compat`, `_errors`, `_grouped`, `_keys`, `_optimizer`, `_rules`,
`_transform`, `_tree`, `_types`, `arithmetic`.

A table is an adapter whose arrays have a leading axis of slots: one adapter in each slot.
"""

from ._route import prepare as prepare
from ._route import route as route
from ._start import init as init
from ._table import insert as insert
from ._table import remove as remove
from ._table import stack as stack
from ._table import take as take
from ._train import Optimizer as Optimizer
from ._train import OptimizerState as OptimizerState
from ._train import optimizer as optimizer
from ._train import restart as restart
from ._train import stop as stop
