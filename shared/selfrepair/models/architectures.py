"""Which architectures satisfy the definitions, decided from the configuration before any weight is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from transformers import PretrainedConfig

from selfrepair.errors import UserError


class Architecture(NamedTuple):
    """Well-known models of an architecture, and how its blocks are built."""

    models: str
    blocks: str


class Refusal(NamedTuple):
    """Why architectures, given as ``model_type: well-known models``, break the definitions."""

    reason: str
    models: dict[str, str]


class Condition(NamedTuple):
    """A setting that breaks the definitions in an architecture (``None``: in any) which otherwise holds."""

    model_type: str | None
    setting: str
    models: str
    breaks: Callable[[PretrainedConfig], bool]
    reason: str


#: By ``model_type`` in config.json. Checked against one full forward pass per head (tests/test_ablation.py).
SUPPORTED: dict[str, Architecture] = {
    "gpt2": Architecture("GPT-2 small to XL, DistilGPT-2", "sequential, LayerNorm, learned positions"),
    "gpt_neo": Architecture("GPT-Neo, TinyStories", "sequential, LayerNorm, learned positions, every other layer local attention"),
    "gpt_neox": Architecture("Pythia, GPT-NeoX-20B", "parallel or sequential, LayerNorm, rotary positions"),
    "llama": Architecture("Llama 1–3, TinyLlama, SmolLM2", "sequential, RMSNorm, rotary positions, multi-head or grouped-query"),
    "mistral": Architecture("Mistral 7B", "sequential, RMSNorm, rotary positions, grouped-query, sliding window"),
    "opt": Architecture("OPT 125M, 1.3B to 66B", "sequential, LayerNorm, learned positions"),
    "phi": Architecture("Phi-1, Phi-1.5, Phi-2", "parallel behind one LayerNorm, partly rotary positions, unembedding with bias"),
    "qwen2": Architecture("Qwen1.5, Qwen2, Qwen2.5", "sequential, RMSNorm, rotary positions, grouped-query"),
    "qwen3": Architecture("Qwen3 0.6B to 32B", "sequential, RMSNorm, rotary positions, grouped-query, normed queries and keys"),
}

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "norms after attention and MLP inside the block, and a soft cap on the logits: outputs do not add linearly",
        {"gemma2": "Gemma 2", "gemma3n": "Gemma 3n", "gemma3n_text": "Gemma 3n"},
    ),
    Refusal(
        "norms after attention and MLP inside the block: their outputs do not add linearly",
        {
            "gemma3": "Gemma 3",
            "gemma3_text": "Gemma 3",
            "gemma4": "Gemma 4",
            "gemma4_text": "Gemma 4",
            "olmo2": "OLMo 2",
            "olmo3": "OLMo 3",
            "exaone4": "EXAONE 4",
            "glm4": "GLM-4-0414",
            "openai-gpt": "GPT-1",
        },
    ),
    Refusal("logits are scaled after the unembedding", {"cohere": "Command R", "cohere2": "Command R7B"}),
    Refusal("residual branches and logits are scaled by constants", {"granite": "Granite 3"}),
    Refusal("its norms scale by one plus their weight, which direct effects do not account for", {"gemma": "Gemma 1"}),
    Refusal("its norms have no weights, which direct effects do not account for", {"olmo": "OLMo 1"}),
    Refusal(
        "an encoder-decoder: the decoder also reads the encoder",
        {
            "t5": "T5",
            "mt5": "mT5",
            "umt5": "UMT5",
            "longt5": "LongT5",
            "switch_transformers": "Switch",
            "t5gemma": "T5Gemma",
            "bart": "BART",
            "mbart": "mBART",
            "pegasus": "Pegasus",
            "marian": "Marian",
            "m2m_100": "M2M-100, NLLB",
            "blenderbot": "Blenderbot",
            "led": "LED",
            "whisper": "Whisper",
        },
    ),
    Refusal(
        "a state-space or recurrent model: it has no attention heads",
        {"mamba": "Mamba", "mamba2": "Mamba 2", "falcon_mamba": "Falcon Mamba", "rwkv": "RWKV", "xlstm": "xLSTM"},
    ),
    Refusal(
        "a hybrid: state-space, recurrent or convolutional layers beside or instead of attention",
        {
            "jamba": "Jamba",
            "zamba": "Zamba",
            "zamba2": "Zamba 2",
            "bamba": "Bamba",
            "falcon_h1": "Falcon-H1",
            "nemotron_h": "Nemotron-H",
            "recurrent_gemma": "RecurrentGemma",
            "granitemoehybrid": "Granite 4",
            "lfm2": "LFM2",
            "qwen3_next": "Qwen3-Next",
            "kimi_linear": "Kimi Linear",
            "olmo_hybrid": "OLMo Hybrid",
        },
    ),
    Refusal(
        "a mixture of experts: an ablation also changes which experts run",
        {
            "mixtral": "Mixtral",
            "qwen2_moe": "Qwen1.5-MoE",
            "qwen3_moe": "Qwen3-MoE",
            "gpt_oss": "gpt-oss",
            "deepseek_v2": "DeepSeek-V2",
            "deepseek_v3": "DeepSeek-V3, R1",
            "phimoe": "Phi-3.5-MoE",
            "olmoe": "OLMoE",
            "flex_olmo": "FlexOlmo",
            "dbrx": "DBRX",
            "granitemoe": "Granite 3 MoE",
            "jetmoe": "JetMoE",
            "llama4": "Llama 4",
            "llama4_text": "Llama 4",
            "glm4_moe": "GLM-4.5",
        },
    ),
    Refusal(
        "not a causal language model: every position reads the tokens after it",
        {
            "bert": "BERT",
            "roberta": "RoBERTa",
            "xlm-roberta": "XLM-R",
            "distilbert": "DistilBERT",
            "albert": "ALBERT",
            "electra": "ELECTRA",
            "deberta": "DeBERTa",
            "deberta-v2": "DeBERTa v2, v3",
            "modernbert": "ModernBERT",
        },
    ),
    Refusal(
        "a multimodal model: only text-only checkpoints are read",
        {
            "llava": "LLaVA",
            "mistral3": "Mistral Small 3.1",
            "mllama": "Llama 3.2 Vision",
            "qwen2_vl": "Qwen2-VL",
            "qwen2_5_vl": "Qwen2.5-VL",
            "qwen3_vl": "Qwen3-VL",
        },
    ),
)

#: What every configuration gives, by these names or others that stand for them.
SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "max_position_embeddings")
#: Architectures whose heads may have any width, and share keys and values.
GROUPED = ("llama", "mistral", "phi", "qwen2", "qwen3")
UNKNOWN = "its definitions were not checked"
SHORT_WINDOW = "only prompts that lie within the sliding window were checked"


def _set(*settings: str) -> Callable[[PretrainedConfig], bool]:
    return lambda config: any(getattr(config, setting, None) for setting in settings)


def _scales(*settings: str) -> Callable[[PretrainedConfig], bool]:
    return lambda config: any(getattr(config, setting, None) not in (None, 1) for setting in settings)


def _off(setting: str) -> Callable[[PretrainedConfig], bool]:
    return lambda config: not getattr(config, setting)


def _positions_change(config: PretrainedConfig) -> bool:
    rotary = getattr(config, "rope_parameters", None) or {}
    return rotary.get("rope_type") in ("dynamic", "longrope")


CONDITIONS: tuple[Condition, ...] = (
    Condition(
        "opt",
        "`do_layer_norm_before: false`",
        "OPT 350M",
        _off("do_layer_norm_before"),
        "norms after attention and MLP inside the block: their outputs do not add linearly",
    ),
    Condition(
        "opt",
        "`word_embed_proj_dim` other than `hidden_size`",
        "OPT 350M",
        lambda config: config.word_embed_proj_dim != config.hidden_size,
        "embeddings are projected to another width",
    ),
    Condition("opt", "`_remove_final_layer_norm: true`", "", _set("_remove_final_layer_norm"), "it has no final norm"),
    Condition(
        "opt",
        "`layer_norm_elementwise_affine: false`",
        "",
        _off("layer_norm_elementwise_affine"),
        "its norms have no weights, which direct effects do not account for",
    ),
    Condition("gpt_neox", "`attention_bias: false`", "", _off("attention_bias"), "TransformerLens reads this attention with biases only"),
    Condition("phi", "`qk_layernorm: true`", "", _set("qk_layernorm"), "TransformerLens does not read its norms of queries and keys"),
    Condition(None, "`add_cross_attention`", "", _set("add_cross_attention"), "cross-attention blocks"),
    Condition(
        None,
        "`is_encoder_decoder`",
        "",
        _set("is_encoder_decoder"),
        "an encoder-decoder: the decoder also reads the encoder",
    ),
    Condition(
        None,
        "`final_logit_softcapping`, `logits_soft_cap`",
        "",
        _set("final_logit_softcapping", "logits_soft_cap"),
        "a soft cap on the logits: outputs do not add linearly",
    ),
    Condition(
        None,
        "`logit_scale`, `logits_scaling`, `residual_multiplier`",
        "",
        _scales("logit_scale", "logits_scaling", "residual_multiplier"),
        "residual branches or logits are scaled by constants",
    ),
    Condition(
        None,
        "`num_experts`, `num_local_experts`, `n_routed_experts`",
        "",
        _set("num_experts", "num_local_experts", "n_routed_experts"),
        "a mixture of experts: an ablation also changes which experts run",
    ),
    Condition(
        None,
        "`vision_config`, `audio_config`",
        "",
        _set("vision_config", "audio_config"),
        "a multimodal model: only text-only checkpoints are read",
    ),
    Condition(
        None,
        "`quantization_config`",
        "GPTQ, AWQ, bitsandbytes …",
        _set("quantization_config"),
        "its weights are quantized: give the checkpoint that it was made from",
    ),
    Condition(
        None,
        "`rope_type: dynamic` or `longrope`",
        "",
        _positions_change,
        "its rotary positions depend on how long prompts are",
    ),
)


def check_architecture(model_type: str | None, name: str) -> None:
    """Refuses an architecture, by its ``model_type`` in config.json, that breaks the definitions or was not checked.

    Raises:
        UserError: it is not one of ``SUPPORTED``; says why.
    """
    if model_type not in SUPPORTED:
        reasons = [refusal.reason for refusal in REFUSALS if model_type in refusal.models]
        raise _refused(name, model_type, reasons[0] if reasons else UNKNOWN)


def check_supported(config: PretrainedConfig, name: str) -> None:
    """Refuses a model for which direct effects and self-repair are not what the definitions say.

    Raises:
        UserError: the architecture or a setting of it breaks the definitions, or a size is none; says which.
    """
    check_architecture(config.model_type, name)
    for setting in SIZES:
        size = getattr(config, setting, None)
        if type(size) is not int or size < 1:
            raise UserError(f"{name}: {setting} must be a positive whole number, in its config.json it is {size!r}")
    heads, width = config.num_attention_heads, getattr(config, "head_dim", None)
    if width is None and config.hidden_size % heads:
        raise UserError(
            f"{name}: not a loadable causal language model (hidden_size {config.hidden_size} is no multiple of num_attention_heads {heads})"
        )
    groups = getattr(config, "num_key_value_heads", None)
    if config.model_type not in GROUPED and (width not in (None, config.hidden_size // heads) or groups not in (None, heads)):
        raise UserError(f"{name}: head_dim and num_key_value_heads in its config.json are none of a '{config.model_type}': take them out")
    for condition in CONDITIONS:
        if condition.model_type in (None, config.model_type) and condition.breaks(config):
            raise _refused(name, config.model_type, f"with {condition.setting.replace('`', '')}: {condition.reason}")


def is_parallel(config: PretrainedConfig) -> bool:
    """Whether the MLP of a supported architecture's blocks reads what the attention of the same block reads."""
    return config.model_type == "phi" or (config.model_type == "gpt_neox" and bool(config.use_parallel_residual))


def check_window(config: PretrainedConfig, prompt_len: int, name: str) -> None:
    """Refuses prompts that are longer than the model's sliding attention window.

    Raises:
        UserError: they are; says how long prompts may be.
    """
    window = getattr(config, "sliding_window", None)
    if window is not None and not (type(window) is int and prompt_len <= window):
        raise UserError(f"{name}: its attention looks back {window} tokens and {SHORT_WINDOW}: give --prompt-len {window} or less")


def _refused(name: str, model_type: str | None, reason: str) -> UserError:
    return UserError(f"{name}: architecture '{model_type}' is not supported: {reason}; supported are {', '.join(sorted(SUPPORTED))}")


def support_table() -> str:
    """Markdown table of what is supported and what is refused, why."""
    rows = [("`model_type`", "models", "supported"), ("---", "---", "---")]
    rows += [(f"`{kind}`", models, f"yes: {blocks}") for kind, (models, blocks) in sorted(SUPPORTED.items())]
    windowed = "`mistral`, `qwen2`, `qwen3` with `sliding_window` shorter than the prompts"
    rows.append((windowed, "", f"no: {SHORT_WINDOW}"))
    for condition in CONDITIONS:
        kind = "any" if condition.model_type is None else f"`{condition.model_type}`"
        rows.append((f"{kind} with {condition.setting}", condition.models, f"no: {condition.reason}"))
    for refusal in REFUSALS:
        names = ", ".join(dict.fromkeys(refusal.models.values()))
        rows.append((", ".join(f"`{kind}`" for kind in refusal.models), names, f"no: {refusal.reason}"))
    rows.append(("any other", "", f"no: {UNKNOWN}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
