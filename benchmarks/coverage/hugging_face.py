"""Tiny configurations of Hugging Face architectures, one per model type."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY, WIDTH, HEADS, HIDDEN, LAYERS, LENGTH = 96, 32, 4, 64, 2, 12

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 0,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
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
    "d_kv": 8,
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
    # text decoders
    "gpt2": (
        "AutoModelForCausalLM",
        {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "n_positions": 32},
        "text",
    ),
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
    # mixtures of experts
    "mixtral": ("AutoModelForCausalLM", _EXPERTS, "text"),
    "qwen2_moe": ("AutoModelForCausalLM", {**_EXPERTS, "shared_expert_intermediate_size": 48}, "text"),
    "qwen3_moe": ("AutoModelForCausalLM", _EXPERTS, "text"),
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
    # encoder-decoders
    "t5": ("AutoModelForSeq2SeqLM", _T5, "text to text"),
    "mt5": ("AutoModelForSeq2SeqLM", _T5, "text to text"),
    "bart": ("AutoModelForSeq2SeqLM", {**_BART, "max_position_embeddings": 32}, "text to text"),
    "marian": ("AutoModelForSeq2SeqLM", {**_BART, "max_position_embeddings": 32}, "text to text"),
    "pegasus": ("AutoModelForSeq2SeqLM", {**_BART, "max_position_embeddings": 32}, "text to text"),
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
    # audio
    "whisper": ("AutoModelForSpeechSeq2Seq", {**_BART, "num_mel_bins": 16, "max_source_positions": 16}, "spectrogram"),
    "wav2vec2": ("AutoModelForCTC", _WAVE, "wave"),
    "hubert": ("AutoModelForCTC", _WAVE, "wave"),
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
}
"""Model type -> (which head, configuration, kind of input)."""


def build_type(model_type: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return a tiny network of a model type and example inputs for it."""
    import transformers

    head, settings, kind = TYPES[model_type]
    config = transformers.AutoConfig.for_model(model_type, **settings)
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
        "text and image": {"input_ids": tokens, "pixel_values": image},
    }[kind]
