"""The architectures that satisfy the definitions, one record each, and the settings that break them.

To add one, add its record to :data:`ARCHITECTURES`: tests build its tiny models and compare them with full
forward passes, and the README's table is made of it (see :mod:`selfrepair.models.support`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Condition:
    """A setting that breaks the definitions in an architecture that otherwise satisfies them.

    ``setting`` is how config.json has it, as Markdown; ``models`` are well-known models that have it.
    """

    setting: str
    breaks: Callable[[PretrainedConfig], bool]
    reason: str
    models: str = ""


@dataclass(frozen=True)
class Architecture:
    """An architecture that satisfies the definitions: how its blocks are built, and tiny models for tests.

    ``causal_lm`` is the class of its language models in transformers, which is what is measured; ``models``
    are well-known ones. ``parallel`` says whether the MLP reads what the attention of its block
    reads, or which setting says so, and ``one_norm`` whether both read one norm. ``any_heads`` says whether
    heads may have any width and share keys and values, ``sliding_window`` whether attention may look back
    over some tokens only, or which setting says so. ``tiny`` has, by a tiny model's name, its settings beside
    :data:`TINY_SHAPE`, and ``more`` what the README's table says beyond the rest.
    """

    model_type: str
    causal_lm: str
    models: str
    norms: str
    positions: str
    tiny: Mapping[str, Mapping[str, object]]
    parallel: bool | str = False
    one_norm: bool = False
    any_heads: bool = False
    sliding_window: bool | str = False
    more: tuple[str, ...] = ()
    conditions: tuple[Condition, ...] = ()

    @property
    def blocks(self) -> str:
        """How its blocks are built, in words."""
        either = "parallel or sequential"
        order = either if isinstance(self.parallel, str) else "parallel" if self.parallel else "sequential"
        norms = f"{order} behind one {self.norms}" if self.one_norm else f"{order}, {self.norms}"
        return ", ".join((norms, f"{self.positions} positions", *self.more))


def _set(*settings: str) -> Callable[[PretrainedConfig], bool]:
    return lambda config: any(getattr(config, setting, None) for setting in settings)


def _scales(*settings: str) -> Callable[[PretrainedConfig], bool]:
    return lambda config: any(getattr(config, setting, None) not in (None, 1) for setting in settings)


def _off(setting: str) -> Callable[[PretrainedConfig], bool]:
    return lambda config: not getattr(config, setting)


def _positions_change(config: PretrainedConfig) -> bool:
    rotary = getattr(config, "rope_parameters", None) or {}
    return rotary.get("rope_type") in ("dynamic", "longrope")


#: What all tiny models have, vocabulary aside, by the names that most configurations give it.
TINY_SHAPE = dict(num_hidden_layers=3, num_attention_heads=4, hidden_size=32, max_position_embeddings=32)

#: Each checked against one full forward pass per head. New ones go last: a tiny model's place is its seed.
ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        model_type="gpt2",
        causal_lm="GPT2LMHeadModel",
        models="GPT-2 small to XL, DistilGPT-2",
        norms="LayerNorm",
        positions="learned",
        tiny={"gpt2": {}},
    ),
    Architecture(
        model_type="gpt_neox",
        causal_lm="GPTNeoXForCausalLM",
        models="Pythia, GPT-NeoX-20B",
        norms="LayerNorm",
        positions="rotary",
        parallel="use_parallel_residual",
        conditions=(
            Condition(
                "`attention_bias: false`",
                _off("attention_bias"),
                "TransformerLens reads this attention with biases only",
            ),
        ),
        tiny={
            "neox-parallel": dict(intermediate_size=64, use_parallel_residual=True),
            "neox-sequential": dict(intermediate_size=64, use_parallel_residual=False),
        },
    ),
    Architecture(
        model_type="llama",
        causal_lm="LlamaForCausalLM",
        models="Llama 1–3, TinyLlama, SmolLM2",
        norms="RMSNorm",
        positions="rotary",
        any_heads=True,
        more=("multi-head or grouped-query",),
        tiny={
            "llama": dict(intermediate_size=48, num_key_value_heads=4),
            "llama-gqa": dict(intermediate_size=48, num_key_value_heads=2, attention_bias=True),
        },
    ),
    Architecture(
        model_type="opt",
        causal_lm="OPTForCausalLM",
        models="OPT 125M, 1.3B to 66B",
        norms="LayerNorm",
        positions="learned",
        conditions=(
            Condition(
                "`do_layer_norm_before: false`",
                _off("do_layer_norm_before"),
                "norms after attention and MLP inside the block: their outputs do not add linearly",
                "OPT 350M",
            ),
            Condition(
                "`word_embed_proj_dim` other than `hidden_size`",
                lambda config: config.word_embed_proj_dim != config.hidden_size,
                "embeddings are projected to another width",
                "OPT 350M",
            ),
            Condition(
                "`_remove_final_layer_norm: true`", _set("_remove_final_layer_norm"), "it has no final norm"
            ),
            Condition(
                "`layer_norm_elementwise_affine: false`",
                _off("layer_norm_elementwise_affine"),
                "its norms have no weights, which direct effects do not account for",
            ),
        ),
        tiny={"opt": dict(ffn_dim=64, word_embed_proj_dim=32)},
    ),
    Architecture(
        model_type="gpt_neo",
        causal_lm="GPTNeoForCausalLM",
        models="GPT-Neo, TinyStories",
        norms="LayerNorm",
        positions="learned",
        more=("every other layer local attention",),
        tiny={  # the second layer sees the last 5 tokens only
            "gpt-neo": dict(
                intermediate_size=64,
                window_size=5,
                attention_types=[[["global", "local"], 1], [["global"], 1]],
            )
        },
    ),
    Architecture(
        model_type="mistral",
        causal_lm="MistralForCausalLM",
        models="Mistral 7B",
        norms="RMSNorm",
        positions="rotary",
        any_heads=True,
        sliding_window=True,
        more=("grouped-query", "sliding window"),
        tiny={"mistral": dict(intermediate_size=48, num_key_value_heads=2, sliding_window=12)},
    ),
    Architecture(
        model_type="qwen2",
        causal_lm="Qwen2ForCausalLM",
        models="Qwen1.5, Qwen2, Qwen2.5",
        norms="RMSNorm",
        positions="rotary",
        any_heads=True,
        sliding_window="use_sliding_window",
        more=("grouped-query",),
        tiny={"qwen2": dict(intermediate_size=48, num_key_value_heads=2)},
    ),
    Architecture(
        model_type="qwen3",
        causal_lm="Qwen3ForCausalLM",
        models="Qwen3 0.6B to 32B",
        norms="RMSNorm",
        positions="rotary",
        any_heads=True,
        sliding_window="use_sliding_window",
        more=("grouped-query", "normed queries and keys"),
        # its heads together are wider than the residual stream
        tiny={"qwen3": dict(intermediate_size=48, num_key_value_heads=2, head_dim=12)},
    ),
    Architecture(
        model_type="phi",
        causal_lm="PhiForCausalLM",
        models="Phi-1, Phi-1.5, Phi-2",
        norms="LayerNorm",
        positions="partly rotary",
        parallel=True,
        one_norm=True,
        any_heads=True,
        more=("unembedding with bias",),
        conditions=(
            Condition(
                "`qk_layernorm: true`",
                _set("qk_layernorm"),
                "TransformerLens does not read its norms of queries and keys",
            ),
        ),
        tiny={"phi": dict(intermediate_size=64)},
    ),
)

#: By ``model_type`` in config.json.
SUPPORTED: dict[str, Architecture] = {architecture.model_type: architecture for architecture in ARCHITECTURES}

#: Settings that break the definitions in whichever architecture they stand.
CONDITIONS: tuple[Condition, ...] = (
    Condition("`add_cross_attention`", _set("add_cross_attention"), "cross-attention blocks"),
    Condition(
        "`is_encoder_decoder`",
        _set("is_encoder_decoder"),
        "an encoder-decoder: the decoder also reads the encoder",
    ),
    Condition(
        "`final_logit_softcapping`, `logits_soft_cap`",
        _set("final_logit_softcapping", "logits_soft_cap"),
        "a soft cap on the logits: outputs do not add linearly",
    ),
    Condition(
        "`logit_scale`, `logits_scaling`, `residual_multiplier`",
        _scales("logit_scale", "logits_scaling", "residual_multiplier"),
        "residual branches or logits are scaled by constants",
    ),
    Condition(
        "`num_experts`, `num_local_experts`, `n_routed_experts`",
        _set("num_experts", "num_local_experts", "n_routed_experts"),
        "a mixture of experts: an ablation also changes which experts run",
    ),
    Condition(
        "`vision_config`, `audio_config`",
        _set("vision_config", "audio_config"),
        "a multimodal model: only text-only checkpoints are read",
    ),
    Condition(
        "`quantization_config`",
        _set("quantization_config"),
        "its weights are quantized: give the checkpoint that it was made from",
        "GPTQ, AWQ, bitsandbytes …",
    ),
    Condition(
        "`rope_type: dynamic` or `longrope`",
        _positions_change,
        "its rotary positions depend on how long prompts are",
    ),
)


def is_parallel(config: PretrainedConfig) -> bool:
    """Whether the MLP of a supported model's blocks reads what the attention of the same block reads."""
    parallel = SUPPORTED[config.model_type].parallel
    return bool(getattr(config, parallel)) if isinstance(parallel, str) else parallel
