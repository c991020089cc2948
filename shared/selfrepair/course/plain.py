"""A model as plain tensors and the PyTorch modules that students put their hooks on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfrepair.engine.direct_effect import FinalNorm, token_directions
from selfrepair.engine.hooks import watching
from selfrepair.models.loading import Model, load_model
from selfrepair.models.parts import weight_out_in


@dataclass(frozen=True)
class PlainRun:
    """What one run of a model leaves, at all positions of all prompts.

    ``residuals[layer]`` is the residual stream before a layer, ``residuals[-1]`` what the final norm reads.
    ``attention`` and ``mlps`` are what a layer's attention and MLP write, biases included. ``activations``
    are the MLPs' neurons after their nonlinearity.
    """

    z: Float[Tensor, "layer prompt position head d_head"]
    attention: Float[Tensor, "layer prompt position d_model"]
    mlps: Float[Tensor, "layer prompt position d_model"]
    activations: Float[Tensor, "layer prompt position neuron"]
    residuals: Float[Tensor, "layer+1 prompt position d_model"]
    logits: Float[Tensor, "prompt position d_vocab"]


class PlainModel:
    """Weights by the names of the paper, and modules for hooks.

    A head writes ``(z − b_V) @ W_O``. ``subtracts_mean`` says whether the final norm is a LayerNorm, which
    takes away the mean of the residual stream, or an RMSNorm, which does not. ``parallel`` says whether the
    MLP of a layer reads what its attention reads (Pythia), and not what the attention has written.

    ``blocks[layer]`` gets the residual stream as its first argument. ``attention_out[layer]`` gets the ``z``
    of all heads side by side, ``[prompt, position, head · d_head]``, and gives what the attention writes.
    ``mlp_out[layer]`` gets the neurons' activations and gives what the MLP writes. ``final_norm`` gets the
    final residual stream. ``hf`` is the Hugging Face model itself, and ``library`` what the library makes
    of it.
    """

    def __init__(self, library: Model):
        self.library = library
        norm = FinalNorm.of(library.final_norm)
        self.gamma: Float[Tensor, " d_model"] = norm.gamma
        self.epsilon: float = norm.epsilon
        self.subtracts_mean: bool = norm.centred
        self.parallel: bool = library.parallel
        self.n_layers: int = library.n_layers
        self.n_heads: int = library.n_heads

    @classmethod
    def load(cls, name: str) -> PlainModel:
        """An embedded model, a folder or a hub id, in float32 on the CPU.

        Raises:
            UserError: as :func:`selfrepair.models.loading.load_model`.
        """
        return cls(load_model(name, "cpu"))

    @property
    def hf(self) -> PreTrainedModel:
        return self.library.hf

    @property
    def blocks(self) -> list[nn.Module]:
        return self.library.blocks

    @property
    def attention_out(self) -> list[nn.Module]:
        return self.library.output_projections

    @property
    def mlp_out(self) -> list[nn.Module]:
        return self.library.mlp_output_projections

    @property
    def final_norm(self) -> nn.Module:
        return self.library.final_norm

    @cached_property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.library.W_U.detach().T

    @cached_property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        return torch.stack([self.library.W_O(layer).detach() for layer in range(self.n_layers)])

    @cached_property
    def b_V(self) -> Float[Tensor, "layer head d_head"]:
        return torch.stack(self.library.value_biases)

    @cached_property
    def W_out(self) -> Float[Tensor, "layer neuron d_model"]:
        """A neuron writes its activation times its row; the MLP adds ``b_out``."""
        return torch.stack([weight_out_in(module).detach().T for module in self.mlp_out])

    @cached_property
    def b_out(self) -> Float[Tensor, "layer d_model"]:
        biases = [cast(Tensor | None, module.bias) for module in self.mlp_out]
        return torch.stack(
            [self.W_out.new_zeros(len(self.gamma)) if b is None else b.detach() for b in biases]
        )

    def directions(
        self, tokens: Int[Tensor, "prompt position"]
    ) -> Float[Tensor, "prompt position-1 d_model"]:
        """The direction ``u`` of each correct next token."""
        return token_directions(self.library, tokens)[0].detach()

    def constants(self, tokens: Int[Tensor, "prompt position"]) -> Float[Tensor, "prompt position-1"]:
        """The part of the correct token's centred logit that no component changes (β, biases)."""
        return token_directions(self.library, tokens)[1].detach()

    def scale(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
        """The final norm's σ."""
        return FinalNorm.of(self.final_norm).sigma(residual)

    @torch.no_grad()
    def run(self, tokens: Int[Tensor, "prompt position"]) -> PlainRun:
        """Runs the model once, with whatever hooks are in place, and keeps what :class:`PlainRun` names."""
        attention, mlps, blocks, final = {}, {}, {}, {}
        with (
            watching(self.attention_out, lambda layer, z, output: attention.update({layer: (z, output)})),
            watching(self.mlp_out, lambda layer, acts, output: mlps.update({layer: (acts, output)})),
            watching(self.blocks, lambda layer, stream, _: blocks.update({layer: stream})),
            watching([self.final_norm], lambda _, stream, __: final.update({0: stream})),
        ):
            logits = self.hf(tokens, use_cache=False).logits
        layers = range(self.n_layers)
        z = torch.stack([attention[layer][0] for layer in layers])
        return PlainRun(
            z=z.unflatten(-1, (self.n_heads, -1)),
            attention=torch.stack([attention[layer][1] for layer in layers]),
            mlps=torch.stack([mlps[layer][1] for layer in layers]),
            activations=torch.stack([mlps[layer][0] for layer in layers]),
            residuals=torch.stack([*[blocks[layer] for layer in layers], final[0]]),
            logits=logits,
        )
