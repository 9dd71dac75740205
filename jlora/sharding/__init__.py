"""How an adapter lies on a mesh. Imports `adapters`, `_rules`, `_tree`, `_types`."""

from ._specs import moments as moments
from ._specs import replicated as replicated
from ._specs import specs as specs
