"""The tables that the laws run over: one list of cases per module.

`plain` holds plain JAX, `control` higher-order primitives, `trees` containers of parameters,
`flax_models` Flax, `models` whole models: those of the examples.
"""

from . import control, flax_models, models, plain, trees
from ._case import Case as Case
from ._case import Problem as Problem

CASES: list[Case] = [*plain.CASES, *control.CASES, *trees.CASES, *flax_models.CASES, *models.CASES]
# Together these take every line and branch of the core that all take. They run every day.
NAMES = """
    matmul split_outputs flip scaled stop_gradient optimization_barrier copied padded
    padded_with_itself weight_times_weight reshape_splits_outputs concatenate_inputs
    bfloat16_compute_over_float32 bfloat16_result jit_returns_the_weight jit_passes_a_tree
    unrolled_stack lookup_filled lookup_scalar lookup_broadcast tied_embedding
    tied_embedding_head_first conv_nchw conv_of_an_empty_batch
    one_matrix_for_the_window repeated_outputs unpacked concatenate_adapted_all
    stack_adapted_one slots_split_after experts_einsum experts_ragged_mlp_that_share_inputs
    experts_with_slots_that_share_inputs experts_with_frozen_that_share_inputs
    experts_scanned_that_share_outputs experts_ragged_mlp python_if_on_a_value trained_in_full
    added_joined_and_measured queries_repeated_for_two_rows depthwise_kernel_of_multipliers
    experts_looked_up_under_vmap
    stack_repeated_along_itself stack_tiled one_column stacked_with_factors_of_two_dtypes
    scan_layers scan_layers_reversed remat fori_loop_dynamic while_loop by_platform cond_in_scan
    weight_chosen_by_cond shard_map_outputs shard_map_gathers_the_weight sharding_constraints
    tree_with_integers_and_scalars
    loops_return_the_weight_of_a_checkpoint streamed_from_the_host
    moved_to_a_mesh_from_the_host
"""
EVERY_DAY = frozenset(NAMES.split())
