"""Cases that are of one kind with others, for the long run.

Every line and branch of the library that they take, and every primitive at the operands that are
weights, is taken by a case that runs every day too. One that is on no list runs every day.
"""

NAMES = """
    matmul_vector matmul_batched weight_left_vector weight_left_matrix inner dot_general
    dot_general_weight_left einsum einsum_weight_left einsum_transposed_result einsum_ellipsis
    transpose swapaxes expand_dims squeeze broadcast slice_inputs slice_outputs slice_twice
    scaled_by_traced unused_alias used_in_both_directions scaled_by_complex full_rank one_output
    chain_of_one_shape chain_of_one_shape_second_only einsum_heads einsum_heads_in
    einsum_interleaved_axes einsum_three_operands tensordot partial_contraction
    transpose_three_axes reshape_merges_outputs reshape_merges_inputs reshape_adds_an_axis
    bfloat16_cast_of_both bfloat16_there_and_back bfloat16_base bfloat16_base_float32_compute
    bfloat16_base_float32_accumulation jit_helper_on_two_weights jit_model jit_nested
    jit_static_argument lookup_index lookup_take lookup_take_clip lookup_negative
    lookup_constant lookup_one_hot lookup_scaled lookup_expanded lookup_columns lookup_cast
    lookup_stored_transposed tied_embedding_not_named weight_shared_by_layers weights_multiplied
    weights_multiplied_with_one_repeated conv_transposed_kernel conv_input_dilation
    conv_used_twice concatenate_adapted_one slots_split_before slots_transposed slots_reshaped
    slots_heads slots_of_axes slots_one_in_the_middle slots_gate_and_up slots_scanned
    experts_einsum_last experts_dot_general experts_vmap experts_vmap_shared_input
    experts_ragged_dot experts_gathered experts_gathered_top_two experts_dense_mixture
    python_flags keyword_arguments added_positions norm_scale norm_scale_by_einsum
    looked_up_positions convolution_of_grouped_batches row_looked_up_under_vmap
    tied_row_under_vmap row_of_one_taken row_of_one_tied matrix_of_one matrix_of_one_by_token
    row_of_two_indices place_before_the_first slice_before_the_first
    two_weights_meet_along_a_new_axis scan_layers scan_layers_axis_1 scan_layers_and_a_constant
    scan_of_scan scan_layers_in_groups scan_first_layers scan_of_remat
    fori_loop_indexes_the_stack scan_indexes_the_stack while_loop_carries_the_weight
    scan_carries_the_weight recurrence cond cond_one_branch_adapted lax_map
    cumulative_and_sorted custom_jvp_builtin custom_jvp custom_vjp weight_decay_in_the_output
    weight_in_the_output force_of_an_energy jvp_inside vjp_inside vmap_inside named_scopes
    shard_map_replicated_unchecked shard_map_outputs_sharded shard_map_inputs scan_in_shard_map
    tree_frozen_dict tree_frozen_dict_by_path tree_nnx_state tree_nnx_state_of_params
    tree_named_tuple_by_path tree_named_tuple_root tree_list tree_tuple tree_list_by_path
    tree_flax_dataclass tree_flax_dataclass_by_path tree_jax_dataclass
    tree_jax_dataclass_by_path tree_without_keys tree_integer_keys tree_with_nothing tree_numpy
    tree_numpy_weight_only tree_one_array_twice tree_bare_array tree_bare_array_by_path
    linen_dense_no_bias linen_dense_general_outputs linen_dense_general_inputs
    linen_dense_general_first_axis linen_dense_general_batch linen_einsum_outputs
    linen_einsum_inputs linen_einsum_per_head linen_attention_query_value linen_attention_out
    linen_attention_normalized linen_attention_cross linen_block linen_block_with_norms_in_full
    linen_dense_bfloat16 linen_attention_bfloat16 linen_map_variables linen_scan_axis_last
    linen_scan_only_up linen_remat linen_scan_of_remat linen_remat_of_scan linen_scan_of_scan
    linen_scan_broadcast linen_vmap_ensemble linen_vmap_experts linen_scan_with_inputs
    linen_scan_with_dropout linen_scan_partitioned linen_scan_of_attention linen_embed
    linen_tied linen_tied_not_named linen_dense_called_twice conv_1d conv_3d conv_pointwise
    conv_grouped conv_depthwise conv_depthwise_multiplier conv_strided conv_dilated
    conv_input_dilated conv_circular conv_causal conv_reflect conv_unbatched conv_two_batch_axes
    conv_local conv_transpose conv_transpose_of_kernel conv_transpose_circular conv_masked
    conv_network rnn_optimized_lstm rnn_simple rnn_conv_lstm linen_eval linen_train
    linen_flag_by_position linen_capture_intermediates linen_parameters_alone
    linen_method_by_name linen_method_by_function linen_apply_function linen_submodule_bound
    linen_python_if_on_a_value linen_while_loop linen_vision_transformer
    linen_positions_looked_up nnx_linear_no_bias nnx_linear_general nnx_linear_general_inputs
    nnx_linear_general_batch nnx_einsum nnx_einsum_per_head nnx_conv nnx_conv_2d_depthwise
    nnx_conv_transpose nnx_attention nnx_attention_query_value nnx_train nnx_eval
    nnx_state_as_argument nnx_whole_state nnx_by_path nnx_method nnx_vmap nnx_unrolled
    nnx_lax_scan nnx_embed nnx_tied_not_named nnx_shared_module nnx_rnn_optimized_lstm
    nnx_fused_qkv nnx_positions model_llama_all_loop model_roberta_all_loop
    model_deberta_qv_scan hf_bert hf_gpt2_everything hf_vit
"""
ALIKE = frozenset(NAMES.split())
