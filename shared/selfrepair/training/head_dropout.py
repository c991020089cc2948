"""Dropout of whole heads and attention layers while a model trains; the trained model is an ordinary one.

Ours, as an intervention on the question that McGrath et al. (2023, §6) leave open: whether a model that loses
heads in training learns to repair.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfrepair.training.config import TrainingConfig

#: The linear map W_O of an attention layer, by architecture: it reads the concatenated z of all heads.
OUT_PROJECTIONS = {"gpt2": "attn.c_proj", "gpt_neox": "attention.dense", "llama": "self_attn.o_proj"}


def keep_mask(probability: float, like: Tensor, *shape: int) -> Tensor:
    """0 with ``probability``, else ``1 / (1 − probability)``, so that what is dropped keeps its mean.

    Drawn from the global generator of ``like``'s device, in ``like``'s dtype.
    """
    kept = torch.rand(shape, device=like.device) >= probability
    return kept.to(like.dtype) / (1 - probability)


@contextmanager
def heads_dropped(model: PreTrainedModel, config: TrainingConfig) -> Iterator[None]:
    """While it lasts, and while ``model`` is in training mode, every forward pass drops at random.

    With ``config.head_dropout`` each head's ``z`` is dropped before ``W_O``, and with
    ``config.attention_dropout_layer`` each attention layer's output after it, its bias included: for all
    positions of a sequence at once, and independently between sequences, layers and heads. What is kept is
    scaled by 1 / (1 − p).
    """
    suffix = OUT_PROJECTIONS[config.architecture]
    projections = [module for name, module in model.named_modules() if name.endswith(suffix)]

    def drop_heads(
        module: nn.Module, arguments: tuple[Float[Tensor, "sequence position d_model"]]
    ) -> tuple[Float[Tensor, "sequence position d_model"]] | None:
        if not module.training:
            return None
        (z,) = arguments
        mask = keep_mask(config.head_dropout, z, len(z), 1, config.n_heads, 1)
        return ((z.unflatten(-1, (config.n_heads, -1)) * mask).flatten(-2),)

    def drop_layer(
        module: nn.Module,
        arguments: tuple[Float[Tensor, "sequence position d_model"]],
        output: Float[Tensor, "sequence position d_model"],
    ) -> Float[Tensor, "sequence position d_model"] | None:
        if not module.training:
            return None
        return output * keep_mask(config.attention_dropout_layer, output, len(output), 1, 1)

    handles = []
    for projection in projections:
        if config.head_dropout:
            handles.append(projection.register_forward_pre_hook(drop_heads))
        if config.attention_dropout_layer:
            handles.append(projection.register_forward_hook(drop_layer))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
