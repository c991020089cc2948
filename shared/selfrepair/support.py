"""Which architectures satisfy the definitions, decided from the configuration before any weight is read."""

from __future__ import annotations

from transformers import PretrainedConfig

from selfrepair.errors import UserError

SUPPORTED: dict[str, str] = {
    "gpt2": "sequential blocks, LayerNorm, learned positions",
    "gpt_neox": "parallel or sequential blocks, LayerNorm, rotary positions (Pythia)",
    "llama": "sequential blocks, RMSNorm, rotary positions, multi-head or grouped-query attention",
    "opt": "sequential blocks, LayerNorm, learned positions; the variants that normalise before attention",
}

REFUSED: dict[str, str] = {
    "gemma2": "norms after attention and MLP inside the block, and a soft cap on the logits: outputs do not add linearly",
    "gemma3": "norms after attention and MLP inside the block: their outputs do not add linearly",
    "gemma3_text": "norms after attention and MLP inside the block: their outputs do not add linearly",
    "olmo2": "norms after attention and MLP inside the block: their outputs do not add linearly",
    "cohere": "logits are scaled after the unembedding",
    "granite": "residual branches and logits are scaled by constants",
    "t5": "an encoder-decoder: the decoder also reads the encoder",
    "bart": "an encoder-decoder: the decoder also reads the encoder",
    "bert": "not a causal language model",
    "mamba": "a state-space model: it has no attention heads",
    "rwkv": "a recurrent model: it has no attention heads",
    "mixtral": "a mixture of experts: an ablation also changes which experts run",
    "qwen2_moe": "a mixture of experts: an ablation also changes which experts run",
    "qwen3_moe": "a mixture of experts: an ablation also changes which experts run",
}


def check_supported(config: PretrainedConfig, name: str) -> None:
    """Refuses a model for which direct effects and self-repair are not what the definitions say.

    Raises:
        UserError: the architecture or a setting of it breaks the definitions; says which.
    """
    kind = config.model_type
    reason = REFUSED.get(kind)
    if kind == "opt" and not config.do_layer_norm_before:
        reason = "norms after attention and MLP inside the block: their outputs do not add linearly"
    elif kind == "opt" and config.word_embed_proj_dim != config.hidden_size:
        reason = "embeddings are projected to another width"
    elif kind == "gpt2" and config.add_cross_attention:
        reason = "cross-attention blocks"
    elif kind not in SUPPORTED and reason is None:
        reason = "its definitions were not checked"
    if reason:
        raise UserError(f"{name}: architecture '{kind}' is not supported: {reason}; supported are {', '.join(sorted(SUPPORTED))}")
