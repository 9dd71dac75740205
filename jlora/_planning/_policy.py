"""A policy for `jax.checkpoint`, made for training steps whose weights are frozen."""

import math
from typing import Any

from .._compat import Primitive

# Elementwise operations and moves, which XLA fuses with the operations that read their results.
# Division and roots are not among them, because computing them takes longer than reading.
_NAMES = """
    abs add add_any and bitcast_convert_type broadcast_in_dim ceil clamp convert_element_type
    copy cos eq erf erfc exp exp2 expand_dims expm1 floor ge gt integer_pow iota is_finite le
    log1p logistic lt max min mul ne neg not one_minus_square or reshape round select_n
    shift_left shift_right_logical sign sin square squeeze stop_gradient sub tanh transpose xor
"""
CHEAP = frozenset(_NAMES.split())
TABLE = 256  # entries of a table that is read by codes of 8 bits
THIN = 16  # a product is thin if it sums this many times fewer terms than either side has rows


def remat_policy(prim: Primitive, *operands: Any, **params: Any) -> bool:
    r"""Makes `jax.checkpoint` save all but the results of elementwise operations and thin products.

    Give it to each layer rather than to the whole model:
    `nn.remat(Block, policy=jlora.remat_policy)`, under `nn.scan` with `prevent_cse=False`.

    With frozen weights, a step needs the input x of a product $x W$ only for
    $\bar A = s\, x^T \bar h$. If x is the output of a norm or an activation function, computing it
    again costs less than keeping it. The same is true of $h B$, which is as large as $x W$ and is
    computed from a small h. Quantized weights are unpacked again, not kept. All other products,
    convolutions, reductions, divisions and roots are saved, so none is computed twice.

    Args:
        prim: a JAX primitive.
        *operands: its operands; only their shapes matter.
        **params: its parameters.

    Returns:
        Whether the results of `prim` are saved for the backward pass.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> layer = lambda w, x: jax.nn.gelu(x @ w)
        >>> f = jax.checkpoint(layer, policy=jlora.remat_policy)
        >>> w, x = jnp.ones((4, 3)), jnp.ones((2, 4))
        >>> bool(jnp.allclose(jax.grad(lambda x: f(w, x).sum())(x),
        ...                   jax.grad(lambda x: layer(w, x).sum())(x)))
        True
    """
    if prim.name == "gather":
        return operands[0].size > TABLE
    if prim.name != "dot_general":
        is_of_codes = all(x.dtype.itemsize == 1 for x in operands)  # such as gathering them
        return prim.name not in CHEAP and not is_of_codes
    (contracted, _), (batch, _) = params["dimension_numbers"]
    terms = math.prod(operands[0].shape[d] for d in contracted)
    rows = min(math.prod(x.shape) // max(terms, 1) for x in operands)
    return bool(batch) or terms * THIN > rows
