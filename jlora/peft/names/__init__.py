"""What leaves and weights are called in PyTorch, and how their axes correspond.

Imports `_folders`.
"""

from . import tables as tables
