"""PyTorch's operators on arrays of JAX, gradients included: torchax, and what it lacks.

Imports `_compat`.
"""
