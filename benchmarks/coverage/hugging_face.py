"""Tiny configurations of Hugging Face architectures, one per model type."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY, WIDTH, HEADS, HIDDEN, LAYERS, LENGTH = 96, 128, 8, 256, 2, 12
HEAD = WIDTH // HEADS

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 0,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": HEAD}
_EXPERTS = {**_GROUPED, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_VISION = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "image_size": 32,
    "patch_size": 8,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": HEAD,
    "d_ff": HIDDEN,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
}
_WAVE = {
    **_TEXT,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (8, 3, 3),
    "conv_stride": (4, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}

_GPT = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "n_positions": 32}
_LATENT = {
    **_TEXT,
    "num_key_value_heads": HEADS,
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": HEAD,
    "qk_rope_head_dim": 4,
    "v_head_dim": HEAD,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_SHORT = {**_BART, "max_position_embeddings": 32}

TYPES: dict[str, tuple[str, dict[str, Any], str]] = {
    # text encoders
    "bert": ("AutoModelForSequenceClassification", _TEXT, "text"),
    "roberta": ("AutoModelForSequenceClassification", {**_TEXT, "max_position_embeddings": 40}, "text"),
    "distilbert": (
        "AutoModelForSequenceClassification",
        {"vocab_size": VOCABULARY, "dim": WIDTH, "n_heads": HEADS, "hidden_dim": HIDDEN, "n_layers": LAYERS},
        "text",
    ),
    "albert": ("AutoModelForSequenceClassification", {**_TEXT, "embedding_size": 16}, "text"),
    "electra": ("AutoModelForSequenceClassification", {**_TEXT, "embedding_size": 16}, "text"),
    "deberta-v2": (
        "AutoModelForSequenceClassification",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        "text",
    ),
    "mpnet": ("AutoModelForSequenceClassification", {**_TEXT, "max_position_embeddings": 40}, "text"),
    "modernbert": (
        "AutoModelForSequenceClassification",
        {**_TEXT, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "local_attention": 8},
        "text",
    ),
    "convbert": ("AutoModelForSequenceClassification", {**_TEXT, "embedding_size": 16, "head_ratio": 2}, "text"),
    "mobilebert": (
        "AutoModelForSequenceClassification",
        {
            **_TEXT,
            "embedding_size": 16,
            "intra_bottleneck_size": 16,
            "true_hidden_size": 16,
            "num_feedforward_networks": 2,
        },
        "text",
    ),
    "squeezebert": (
        "AutoModelForSequenceClassification",
        {**_TEXT, "embedding_size": WIDTH, "q_groups": 2, "k_groups": 2, "v_groups": 2, "output_groups": 2},
        "text",
    ),
    "fnet": (
        "AutoModelForSequenceClassification",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS},
        "text",
    ),
    "funnel": (
        "AutoModelForSequenceClassification",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "n_head": HEADS,
            "d_head": HEAD,
            "d_inner": HIDDEN,
            "block_sizes": [1, 1],
        },
        "text",
    ),
    "xlnet": (
        "AutoModelForSequenceClassification",
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_head": HEADS, "d_inner": HIDDEN, "n_layer": LAYERS},
        "text",
    ),
    "longformer": (
        "AutoModelForSequenceClassification",
        {**_TEXT, "attention_window": [4, 4], "max_position_embeddings": 40},
        "text",
    ),
    "big_bird": (
        "AutoModelForSequenceClassification",
        {**_TEXT, "attention_type": "original_full", "max_position_embeddings": 40},
        "text",
    ),
    "nystromformer": (
        "AutoModelForSequenceClassification",
        {**_TEXT, "max_position_embeddings": 40, "segment_means_seq_len": LENGTH, "num_landmarks": 4},
        "text",
    ),
    # text decoders
    "gpt2": ("AutoModelForCausalLM", _GPT, "text"),
    "gpt_neox": ("AutoModelForCausalLM", _TEXT, "text"),
    "gpt_neo": (
        "AutoModelForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_heads": HEADS,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 32,
        },
        "text",
    ),
    "opt": (
        "AutoModelForCausalLM",
        {**_TEXT, "ffn_dim": HIDDEN, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 32},
        "text",
    ),
    "bloom": (
        "AutoModelForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_head": HEADS, "n_layer": LAYERS},
        "text",
    ),
    "llama": ("AutoModelForCausalLM", _GROUPED, "text"),
    "llama/ungrouped": ("AutoModelForCausalLM", {**_GROUPED, "num_key_value_heads": HEADS}, "text"),
    "mistral": ("AutoModelForCausalLM", _GROUPED, "text"),
    "qwen2": ("AutoModelForCausalLM", _GROUPED, "text"),
    "qwen3": ("AutoModelForCausalLM", _GROUPED, "text"),
    "gemma": ("AutoModelForCausalLM", _GROUPED, "text"),
    "gemma2": ("AutoModelForCausalLM", {**_GROUPED, "sliding_window": 8}, "text"),
    "phi": ("AutoModelForCausalLM", _TEXT, "text"),
    "phi3": ("AutoModelForCausalLM", {**_GROUPED, "bos_token_id": 1, "eos_token_id": 2}, "text"),
    "falcon": ("AutoModelForCausalLM", {**_TEXT, "ffn_hidden_size": HIDDEN}, "text"),
    "stablelm": ("AutoModelForCausalLM", _GROUPED, "text"),
    "olmo2": ("AutoModelForCausalLM", _GROUPED, "text"),
    "starcoder2": ("AutoModelForCausalLM", _GROUPED, "text"),
    "cohere": ("AutoModelForCausalLM", _GROUPED, "text"),
    "granite": ("AutoModelForCausalLM", _GROUPED, "text"),
    "gptj": ("AutoModelForCausalLM", {**_GPT, "rotary_dim": 4}, "text"),
    "codegen": ("AutoModelForCausalLM", {**_GPT, "rotary_dim": 4}, "text"),
    "gpt_bigcode": ("AutoModelForCausalLM", _GPT, "text"),
    "mpt": (
        "AutoModelForCausalLM",
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": 32},
        "text",
    ),
    "glm4": ("AutoModelForCausalLM", _GROUPED, "text"),
    "gemma3_text": ("AutoModelForCausalLM", {**_GROUPED, "sliding_window": 8}, "text"),
    "nemotron": ("AutoModelForCausalLM", _GROUPED, "text"),
    "exaone4": ("AutoModelForCausalLM", {**_GROUPED, "sliding_window": 8}, "text"),
    # mixtures of experts
    "mixtral": ("AutoModelForCausalLM", _EXPERTS, "text"),
    "qwen2_moe": ("AutoModelForCausalLM", {**_EXPERTS, "shared_expert_intermediate_size": 48}, "text"),
    "qwen3_moe": ("AutoModelForCausalLM", _EXPERTS, "text"),
    "olmoe": ("AutoModelForCausalLM", _EXPERTS, "text"),
    "granitemoe": ("AutoModelForCausalLM", _EXPERTS, "text"),
    "phimoe": ("AutoModelForCausalLM", _EXPERTS, "text"),
    "gpt_oss": ("AutoModelForCausalLM", _EXPERTS, "text"),
    "deepseek_v2": ("AutoModelForCausalLM", _LATENT, "text"),
    "deepseek_v3": ("AutoModelForCausalLM", _LATENT, "text"),
    # state-space models
    "mamba": (
        "AutoModelForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "state_size": 8, "num_hidden_layers": LAYERS},
        "text",
    ),
    "rwkv": (
        "AutoModelForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "context_length": 32},
        "text",
    ),
    "mamba2": (
        "AutoModelForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "state_size": 8,
            "num_hidden_layers": LAYERS,
            "num_heads": 2 * HEADS,
            "head_dim": HEAD,
            "n_groups": 1,
            "chunk_size": 4,
        },
        "text",
    ),
    "falcon_mamba": (
        "AutoModelForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "state_size": 8, "num_hidden_layers": LAYERS},
        "text",
    ),
    "recurrent_gemma": (
        "AutoModelForCausalLM",
        {**_GROUPED, "lru_width": WIDTH, "attention_window_size": 8, "num_hidden_layers": 3},
        "text",
    ),
    "jamba": (
        "AutoModelForCausalLM",
        {
            **_EXPERTS,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        "text",
    ),
    "bamba": (
        "AutoModelForCausalLM",
        {
            **_GROUPED,
            "attn_layer_indices": [1],
            "mamba_n_heads": 2 * HEADS,
            "mamba_d_head": HEAD,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 4,
        },
        "text",
    ),
    # encoder-decoders
    "t5": ("AutoModelForSeq2SeqLM", _T5, "text to text"),
    "mt5": ("AutoModelForSeq2SeqLM", _T5, "text to text"),
    "bart": ("AutoModelForSeq2SeqLM", {**_BART, "max_position_embeddings": 32}, "text to text"),
    "marian": ("AutoModelForSeq2SeqLM", {**_BART, "max_position_embeddings": 32}, "text to text"),
    "pegasus": ("AutoModelForSeq2SeqLM", {**_BART, "max_position_embeddings": 32}, "text to text"),
    "m2m_100": ("AutoModelForSeq2SeqLM", _SHORT, "text to text"),
    "blenderbot": ("AutoModelForSeq2SeqLM", _SHORT, "text to text"),
    "switch_transformers": (
        "AutoModelForSeq2SeqLM",
        {**_T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        "text to text",
    ),
    "longt5": ("AutoModelForSeq2SeqLM", {**_T5, "local_radius": 3}, "text to text"),
    "led": (
        "AutoModelForSeq2SeqLM",
        {**_BART, "attention_window": 4, "max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 32},
        "text to text",
    ),
    # vision
    "vit": ("AutoModelForImageClassification", _VISION, "image"),
    "deit": ("AutoModel", _VISION, "image"),
    "beit": ("AutoModelForImageClassification", {**_VISION, "use_relative_position_bias": True}, "image"),
    "dinov2": ("AutoModelForImageClassification", {**_VISION, "mlp_ratio": 2}, "image"),
    "swin": (
        "AutoModelForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        "image",
    ),
    "convnext": (
        "AutoModelForImageClassification",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
        "image",
    ),
    "resnet": (
        "AutoModelForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
        "image",
    ),
    "segformer": (
        "AutoModelForSemanticSegmentation",
        {
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "sr_ratios": [2, 1],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [2, 4],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
        },
        "image",
    ),
    "yolos": ("AutoModelForObjectDetection", {**_VISION, "image_size": [32, 32], "num_detection_tokens": 5}, "image"),
    "mobilevit": (
        "AutoModelForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
            "num_attention_heads": 4,
        },
        "image",
    ),
    "poolformer": (
        "AutoModelForImageClassification",
        {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]},
        "image",
    ),
    "pvt": (
        "AutoModelForImageClassification",
        {
            "image_size": 32,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "sequence_reduction_ratios": [2, 1],
            "patch_sizes": [4, 2],
            "strides": [4, 2],
            "num_attention_heads": [2, 4],
            "mlp_ratios": [2, 2],
        },
        "image",
    ),
    "regnet": (
        "AutoModelForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "groups_width": 8},
        "image",
    ),
    "efficientnet": (
        "AutoModelForImageClassification",
        {"image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
        "image",
    ),
    "bit": (
        "AutoModelForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 4},
        "image",
    ),
    "swinv2": (
        "AutoModelForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        "image",
    ),
    "dinov3_vit": ("AutoModel", _VISION, "image"),
    "vit_mae": (
        "AutoModelForPreTraining",
        {
            **_VISION,
            "decoder_hidden_size": 16,
            "decoder_num_attention_heads": 2,
            "decoder_num_hidden_layers": 1,
            "decoder_intermediate_size": 32,
        },
        "image",
    ),
    "dpt": (
        "AutoModelForDepthEstimation",
        {
            **_VISION,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 16, 24, 32],
            "fusion_hidden_size": 16,
        },
        "image",
    ),
    "videomae": ("AutoModelForVideoClassification", {**_VISION, "num_frames": 4, "tubelet_size": 2}, "video"),
    "timesformer": ("AutoModelForVideoClassification", {**_VISION, "num_frames": 4}, "video"),
    # audio
    "whisper": ("AutoModelForSpeechSeq2Seq", {**_BART, "num_mel_bins": 16, "max_source_positions": 16}, "spectrogram"),
    "wav2vec2": ("AutoModelForCTC", _WAVE, "wave"),
    "hubert": ("AutoModelForCTC", _WAVE, "wave"),
    "wavlm": ("AutoModelForCTC", _WAVE, "wave"),
    "sew": ("AutoModelForCTC", {**_WAVE, "squeeze_factor": 2}, "wave"),
    "audio-spectrogram-transformer": (
        "AutoModelForAudioClassification",
        {
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "intermediate_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "patch_size": 8,
            "frequency_stride": 8,
            "time_stride": 8,
            "max_length": 32,
            "num_mel_bins": 16,
        },
        "frames",
    ),
    "speech_to_text": (
        "AutoModelForSpeechSeq2Seq",
        {
            **_BART,
            "input_feat_per_channel": 16,
            "max_source_positions": 64,
            "max_target_positions": 32,
            "conv_channels": 32,
        },
        "frames to text",
    ),
    # multimodal
    "clip": (
        "AutoModelForZeroShotImageClassification",
        {"text_config": {**_TEXT, "eos_token_id": 2}, "vision_config": _VISION, "projection_dim": 16},
        "text and image",
    ),
    "siglip": (
        "AutoModelForZeroShotImageClassification",
        {"text_config": {**_TEXT, "max_position_embeddings": LENGTH}, "vision_config": _VISION},
        "text and image",
    ),
    "blip": (
        "AutoModel",
        {
            "text_config": {**_TEXT, "max_position_embeddings": 32, "bos_token_id": 1, "sep_token_id": 2},
            "vision_config": _VISION,
            "projection_dim": 16,
        },
        "text and image",
    ),
    "vilt": ("AutoModel", {**_TEXT, **_VISION, "max_position_embeddings": 32}, "text and image"),
    "chinese_clip": (
        "AutoModel",
        {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 16},
        "text and image",
    ),
    "git": (
        "AutoModelForCausalLM",
        {**_TEXT, "vision_config": _VISION, "max_position_embeddings": 64},
        "text and image",
    ),
    "llava": (
        "AutoModelForImageTextToText",
        {
            "text_config": {"model_type": "llama", **_GROUPED},
            "vision_config": {"model_type": "clip_vision_model", **_VISION},
            "image_token_index": 2,
        },
        "image in text",
    ),
}
"""Model type, or type/variant -> (which head, configuration, kind of input)."""


def build_type(model_type: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return a tiny network of a model type and example inputs for it."""
    import transformers

    head, settings, kind = TYPES[model_type]
    config = transformers.AutoConfig.for_model(model_type.partition("/")[0], **settings)
    config.use_cache = False
    model = getattr(transformers, head).from_config(config)
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH) % (VOCABULARY - 3) + 3
    size = settings.get("image_size", settings.get("vision_config", {}).get("image_size", 32))
    size = size[0] if isinstance(size, list) else size
    image = torch.randn(2, 3, size, size)
    return model, {
        "text": {"input_ids": tokens},
        "text to text": {"input_ids": tokens, "decoder_input_ids": tokens},
        "image": {"pixel_values": image},
        "spectrogram": {"input_features": torch.randn(2, 16, 32), "decoder_input_ids": tokens},
        "wave": {"input_values": torch.randn(2, 800)},
        "frames": {"input_values": torch.randn(2, 32, 16)},
        "frames to text": {"input_features": torch.randn(2, 32, 16), "decoder_input_ids": tokens},
        "video": {"pixel_values": torch.randn(2, 4, 3, size, size)},
        "text and image": {"input_ids": tokens, "pixel_values": image},
        "image in text": {"input_ids": torch.cat([torch.full((2, 16), 2), tokens], 1), "pixel_values": image},
    }[kind]
