"""Settings of single model types beyond the generic shrinking of `zoo.py`; keyed by type, also of sub-configs."""

from typing import Any

__all__ = ["EAGER_ONLY", "FLOAT32_ONLY", "OVERRIDES", "UNBUILDABLE"]

# an override with this value omits the field, so that the class computes it
ABSENT: Any = ...

HYBRID = ["linear_attention", "full_attention"] * 2
CONV = ["conv", "full_attention"] * 2
# sparse attention chooses among fewer keys than a test input has
SPARSE = {"index_topk": 6}
LATENT_VALUES = {"num_key_value_heads": 4}
GROUPED = {"n_group": 2, "topk_group": 1}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
ZAMBA = {"attention_hidden_size": 128, "attention_head_dim": 32}
ORIGINAL_FULL = {"attention_type": "original_full"}
GRANITE = {"attention_multiplier": 0.25}
VISION_SIZES = {"image_size": 28, "patch_size": 14}

OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": GROUPED,
    "axk2": SPARSE,
    "bailing_hybrid": {"num_expert_group": 2, "topk_group": 1, "layer_types": HYBRID},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "beam": GROUPED,
    "big_bird": ORIGINAL_FULL,
    "bigbird_pegasus": ORIGINAL_FULL,
    "blt": {"encoder_hash_byte_group_size": [3, 4], "encoder_hash_byte_group_vocab": 64, "use_cache": False},
    "blt.encoder_config": {"hidden_size_global": 64},
    "blt.decoder_config": {"hidden_size_global": 64},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5},
    "cohere2_moe": {"logit_scale": 0.5},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": None,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        }
    },
    "dbrx.attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    "dbrx.ffn_config": {"moe_top_k": 2},
    "deepseek_v3": GROUPED,
    "deepseek_v32": GROUPED | SPARSE,
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "o_lora_rank": 16,
        "o_groups": 2,
        "hc_mult": 2,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "index_topk": 3,
    },
    # keeps 8 keys, fewer than a test input has: its sparse mask is on
    "doge": {"sliding_window": None, "keep_window_size": 8},
    "dots3_note_text": SPARSE
    | LATENT_VALUES
    | {
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 20,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 12,
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": {"num_kv_shared_layers": 2, "global_head_dim": 24},
    "gemma4_unified_text": {"global_head_dim": 24},
    "glm_moe_dsa": SPARSE,
    "granite": GRANITE,
    "granite_swa": GRANITE,
    "granitemoe": GRANITE,
    "granitemoe_swa": GRANITE,
    "granitemoehybrid": GRANITE | {"layer_types": HYBRID, "num_hidden_layers": 4, "position_embedding_type": "rope"},
    "granitemoeshared": GRANITE,
    "hrm_text": {"num_layers_per_stack": ABSENT},
    "hy_v4": SPARSE,
    "hyperclovax": GRANITE,
    "inkling2_text": {"unpadded_vocab_size": 128, "log_scaling_n_floor": 6, "rel_extent": 8},
    "inkling_text": {"logits_mup_width_multiplier": 1.0, "log_scaling_n_floor": 6, "rel_extent": 8},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "laguna": {"num_attention_heads_per_layer": [4, 8, 4, 8]},
    "lfm2": {"layer_types": CONV, "num_hidden_layers": 4, "full_attn_idxs": ABSENT},
    "lfm2_moe": {"layer_types": CONV, "num_hidden_layers": 4},
    "llama4_text": {"attention_chunk_size": 7, "floor_scale": 4, "attn_scale": 0.5},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": ["dense", "sparse"] * 2,
        "num_hidden_layers": 4,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "modernbert-decoder": {"local_attention": 10},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "qwen3_5_moe_text": {"rope_parameters": MROPE},
    "qwen3_5_text": {"rope_parameters": MROPE},
    "qwen4_exp_text": {
        "rope_parameters": MROPE,
        "hc_count": 2,
        "hc_lowrank": 16,
        "ple_layer_ids": [1],
        "ple_embed_dim": 16,
        "ngram_vocab_size_base": 50,
        "heads_per_ngram": 2,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 4,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "eos_token_id": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [32, 32],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "hash_seed": 0,
        "num_buckets": 4,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 128,
        "pronunciation_embed_dim": 16,
        "shape_vocab_size": 128,
        "shape_embed_dim": 16,
    },
    "xlm": {"causal": True},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": ZAMBA,
    "zamba2": ZAMBA | {"hybrid_layer_ids": ABSENT, "adapter_rank": 8},
    "zaya": {
        "layer_types": ["hybrid", "hybrid_sliding"] * 2,
        "num_hidden_layers": 4,
        "num_experts_per_tok": 1,
        "router_hidden_size": 16,
    },
    # the towers of multimodal types: never run here, only kept small
    "dots3_note.vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "dots3_note.audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64, "downsample_hidden_size": 16},
    "gemma3n_audio": {
        "conf_num_hidden_layers": 1,
        "conf_num_attention_heads": 2,
        "sscp_conv_channel_size": (8, 4),
        "vocab_size": 4,
        "vocab_offset": 124,
    },
    "gemma3n_vision": {"vocab_size": 4, "vocab_offset": 120},
    "got_ocr2.vision_config": VISION_SIZES | {"mlp_dim": 96, "output_channels": 16, "global_attn_indexes": [1]},
    "phi4_multimodal_audio": {
        "ext_pw_out_channel": 64,
        "depthwise_separable_out_channel": 64,
        "nemo_conv_channels": 16,
        "num_blocks": 2,
        "input_size": 16,
    },
    "phi4_multimodal_vision": VISION_SIZES | {"crop_size": 28},
    # sections of rotation that fit the small heads
    "glm4v_text": AXES,
    "glm_ocr_text": AXES,
    "paddleocr_vl_text": AXES,
    "qwen2_5_omni_text": AXES,
    "qwen2_5_vl_text": AXES,
    "qwen2_vl_text": AXES,
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
    "qwen2_vl.vision_config": {"embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2},
    "qwen2_5_vl.vision_config": {"out_hidden_size": 64, "window_size": 28, "fullatt_block_indexes": [1], "depth": 2},
    "qwen3_vl.vision_config": {"out_hidden_size": 64, "depth": 3, "deepstack_visual_indexes": [0, 1]},
    "qwen3_vl_moe.vision_config": {"out_hidden_size": 64, "depth": 3, "deepstack_visual_indexes": [0, 1]},
    "qwen3_5.vision_config": {"out_hidden_size": 64, "depth": 2},
    "internvl.vision_config": {"image_size": [56, 56], "patch_size": [14, 14]},
    "glm4v.vision_config": {"out_hidden_size": 64, "depth": 2},
    "glm4v_moe.vision_config": {"out_hidden_size": 64, "depth": 2},
    "glm46v.vision_config": {"out_hidden_size": 64, "depth": 2},
    "glm_ocr.vision_config": {"out_hidden_size": 64, "depth": 2},
    "glmga.vision_config": {"out_hidden_size": 64, "depth": 2},
    "cohere_compass.vision_config": {"out_hidden_size": 64, "depth": 2},
    "cosmos3_omni.vision_config": {"out_hidden_size": 64, "depth": 3, "deepstack_visual_indexes": [0, 1]},
    "exaone4_5.vision_config": {"out_hidden_size": 64, "window_size": 28, "fullatt_block_indexes": [1], "depth": 2},
    "qwen3_5_moe.vision_config": {"out_hidden_size": 64, "depth": 2},
    "chameleon": {"vocabulary_map": {"<image>": 107}},
    "cosmos3_edge_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    },
    "emu3": {"vocabulary_map": {"<image>": 107}},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [96, 48],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
    },
    "fun_asr_nano.adaptor_config": {"intermediate_size": 16},
    "granite4_vision": {"deepstack_layer_map": [], "spatial_target_layers": [], "downsample_rate": "1/2"},
    "granite_docling.vision_config": {"out_hidden_size": 64},
    "hunyuan_vl_text": {
        "rope_parameters": {
            "rope_type": "dynamic",
            "rope_theta": 10000.0,
            "factor": 1.0,
            "alpha": 2.0,
            "xdrope_section": [2, 2, 2, 2],
        }
    },
    "inkling2.vision_config": {"text_hidden_size": 64},
    "molmo2.adapter_config": {"vision_feature_layer": [1, 0]},
    "nemotron_h_omni.vision_config": {"video_temporal_patch_size": 2},
    # their configurations leave these out, and a padded call reads them
    "qwen2_5_omni_thinker": {"vision_start_token_id": 110, "vision_end_token_id": 111, "audio_end_token_id": 112},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 110, "vision_end_token_id": 111, "audio_end_token_id": 112},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3.vision_config": {"image_size": 56, "patch_size": 14},
    # without these they read no pictures
    "gemma4": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "pooling_kernel_size": 2,
            "patch_size": 4,
            "position_embedding_size": 16,
        }
    },
    "gemma4_unified": {
        "vision_config": {
            "patch_size": 4,
            "pooling_kernel_size": 1,
            "mm_embed_dim": 32,
            "mm_posemb_size": 16,
            "output_proj_dims": 32,
        }
    },
    "llava.vision_config": {"image_size": 56, "patch_size": 14},
}

DRAFTER = "a drafter: ignores input_ids, reads the embeddings and keys of the model it drafts for"
UNBUILDABLE: dict[str, str] = {
    "gemma4_assistant": DRAFTER,
    "gemma4_unified_assistant": DRAFTER,
}

# the first casts to float32 inside; in the second, float64's smallest number is too large for a Python float
FLOAT32_ONLY: frozenset[str] = frozenset({"inkling2_text", "xglm"})
# sdpa drops the softcap, or the sparse mask, in some of the supported versions
EAGER_ONLY: frozenset[str] = frozenset({"doge", "gemma2", "vaultgemma"})
