"""Cases that are of one kind with others, for the long run.

Every line and branch of the library that they take, and every primitive at the operands that are
weights, is taken by a case that runs every day too. One that is on no list runs every day.
"""

NAMES = """
    matmul_vector matmul_batched weight_left_vector weight_left_matrix inner dot_general
    dot_general_weight_left einsum einsum_weight_left einsum_transposed_result einsum_ellipsis
    transpose swapaxes expand_dims squeeze broadcast slice_inputs slice_outputs slice_twice
    scaled_by_traced unused_alias used_in_both_directions scaled_by_complex one_output
    einsum_three_operands partial_contraction reshape_adds_an_axis bfloat16_cast_of_both
    bfloat16_there_and_back bfloat16_base bfloat16_base_float32_compute
    bfloat16_base_float32_accumulation jit_helper_on_two_weights jit_static_argument lookup_index
    lookup_take lookup_take_clip lookup_negative lookup_constant lookup_one_hot lookup_scaled
    lookup_expanded lookup_columns lookup_cast lookup_stored_transposed tied_embedding_not_named
    weights_multiplied_with_one_repeated conv_transposed_kernel conv_used_twice
    concatenate_adapted_one slots_split_before slots_transposed slots_reshaped slots_heads
    slots_of_axes slots_one_in_the_middle slots_gate_and_up slots_scanned experts_einsum_last
    experts_vmap_shared_input experts_ragged_dot experts_gathered experts_gathered_top_two
    experts_dense_mixture python_flags keyword_arguments added_positions looked_up_positions
    convolution_of_grouped_batches row_looked_up_under_vmap tied_row_under_vmap row_of_one_taken
    row_of_one_tied matrix_of_one matrix_of_one_by_token row_of_two_indices place_before_the_first
    slice_before_the_first two_weights_meet_along_a_new_axis scan_layers scan_layers_and_a_constant
    scan_of_remat scan_indexes_the_stack scan_carries_the_weight cond lax_map custom_jvp custom_vjp
    weight_in_the_output vjp_inside vmap_inside shard_map_replicated_unchecked
    shard_map_outputs_sharded shard_map_inputs scan_in_shard_map tree_frozen_dict_by_path
    tree_nnx_state_of_params tree_named_tuple_root tree_list_by_path tree_flax_dataclass_by_path
    tree_without_keys tree_integer_keys tree_with_nothing tree_numpy tree_numpy_weight_only
    tree_one_array_twice tree_bare_array tree_bare_array_by_path linen_dense_no_bias
    linen_dense_general_inputs linen_dense_general_batch linen_einsum_per_head
    linen_attention_normalized linen_attention_cross linen_block_with_norms_in_full
    linen_dense_bfloat16 linen_attention_bfloat16 linen_map_variables linen_scan_axis_last
    linen_scan_only_up linen_scan_of_scan linen_scan_broadcast linen_vmap_ensemble
    linen_scan_with_dropout linen_scan_partitioned linen_embed linen_tied conv_depthwise_multiplier
    conv_local conv_transpose_of_kernel conv_transpose_circular conv_masked linen_eval linen_train
    linen_capture_intermediates linen_parameters_alone linen_method_by_name linen_apply_function
    linen_python_if_on_a_value linen_while_loop linen_vision_transformer nnx_linear_general
    nnx_linear_general_batch nnx_einsum_per_head nnx_conv_transpose nnx_attention nnx_train
    nnx_state_as_argument nnx_whole_state nnx_by_path nnx_method nnx_vmap nnx_unrolled
    nnx_shared_module nnx_rnn_optimized_lstm nnx_fused_qkv model_llama_all_loop
    model_roberta_all_loop model_deberta_qv_scan hf_bert hf_gpt2_everything hf_vit
"""
ALIKE = frozenset(NAMES.split())
