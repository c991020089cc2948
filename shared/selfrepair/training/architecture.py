"""From a training configuration to an untrained Hugging Face model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from selfrepair.errors import UserError
from selfrepair.models.checkpoints import find_model
from selfrepair.training.config import TrainingConfig


def build_model(config: TrainingConfig, bos_token_id: int) -> PreTrainedModel:
    """A randomly initialised float32 model; embedding and unembedding are tied.

    ``gpt2`` is sequential with LayerNorm and learned positions, ``gpt_neox`` parallel with
    LayerNorm and rotary positions on a quarter of each head, ``llama`` sequential with RMSNorm,
    SwiGLU and full rotary positions, without biases. ``d_mlp`` is the number of neurons.
    """
    torch.manual_seed(config.seed)
    common: dict[str, Any] = dict(
        vocab_size=config.vocab_size,
        bos_token_id=bos_token_id,
        eos_token_id=bos_token_id,
        tie_word_embeddings=True,
        attn_implementation="eager",  # on CPU, several times faster than SDPA's backward at these sizes
        use_cache=False,
    )
    match config.architecture:
        case "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(
                    n_positions=config.sequence_length,
                    n_embd=config.d_model,
                    n_layer=config.n_layers,
                    n_head=config.n_heads,
                    n_inner=config.d_mlp,
                    activation_function="gelu_pytorch_tanh",  # GPT-2's GELU in one kernel instead of eight
                    resid_pdrop=config.dropout,
                    embd_pdrop=config.dropout,
                    attn_pdrop=config.dropout,
                    **common,
                )
            )
        case "gpt_neox":
            return GPTNeoXForCausalLM(
                GPTNeoXConfig(
                    max_position_embeddings=config.sequence_length,
                    hidden_size=config.d_model,
                    num_hidden_layers=config.n_layers,
                    num_attention_heads=config.n_heads,
                    intermediate_size=config.d_mlp,
                    attention_dropout=config.dropout,
                    hidden_dropout=config.dropout,
                    **common,
                )
            )
        case "llama":
            return LlamaForCausalLM(
                LlamaConfig(
                    max_position_embeddings=config.sequence_length,
                    hidden_size=config.d_model,
                    num_hidden_layers=config.n_layers,
                    num_attention_heads=config.n_heads,
                    num_key_value_heads=config.n_heads,
                    intermediate_size=config.d_mlp,
                    attention_dropout=config.dropout,
                    **common,
                )
            )
    raise ValueError(f"architecture {config.architecture!r} has no builder")


def start_from(model: PreTrainedModel, name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Gives ``model`` the weights of the embedded model or folder ``name``, to be fine-tuned.

    Raises:
        UserError: no such model, or one of another architecture, shape or tokenizer.
    """
    folder = find_model(name)
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    shapes, own = ({key: tensor.shape for key, tensor in one.state_dict().items()} for one in (found, model))
    if type(found) is not type(model) or shapes != own:
        raise UserError(f"{name}: not of the architecture and shape that the configuration to start from has")
    vocabulary = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
    if vocabulary != tokenizer.get_vocab():
        raise UserError(
            f"{name}: has another tokenizer than this text and configuration make; give the text that it was "
            f"trained on, and its vocab_size and gazetteer settings"
        )
    model.load_state_dict(found.state_dict())
