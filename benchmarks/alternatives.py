"""The alternatives to the engine, one head at a time through a full forward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import ActivationCache

from selfrepair.models.loading import Model

Head = tuple[int, int]


class Hooked:
    """One head at a time through ``TransformerBridge``; resample ablation.

    Clean pass and donors' ``z`` are made here, once, and are in nobody's time.
    """

    @torch.no_grad()
    def __init__(self, model: Model, tokens: Int[Tensor, "prompt position"]):
        self.bridge = model.bridge
        self.tokens, self._itemsize = tokens, model.dtype.itemsize
        self.n_layers, self.n_heads = model.n_layers, model.n_heads
        layers = range(self.n_layers)
        self.names = [
            f"blocks.{layer}.{part}" for layer in layers for part in ("attn.hook_z", "hook_mlp_out")
        ]
        self.names.append("ln_final.hook_scale")
        logits, self.clean = self.bridge.run_with_cache(tokens, names_filter=self.names)
        self.clean_logit = self._centred_correct_logit(logits)

    def breakdown_bytes(self) -> int:
        """Memory that :meth:`breakdown` takes at least: heads' outputs, gathered, stacked and normalised."""
        return (
            3 * self.n_layers * self.n_heads * self.tokens.numel() * self.bridge.cfg.d_model * self._itemsize
        )

    @torch.no_grad()
    def logit_change(self, head: Head) -> dict[str, Float[Tensor, "prompt position-1"]]:
        """(a) One full forward pass with the head replaced."""
        ablated = self.bridge.run_with_hooks(self.tokens, fwd_hooks=[self._replace(head)])
        return {"logit_change": self._centred_correct_logit(ablated) - self.clean_logit}

    @torch.no_grad()
    def breakdown(self, head: Head) -> dict[str, Float[Tensor, "prompt position-1"]]:
        """(b) The way of the paper's code: a cached pass for the direct effects, another for the logits."""
        with self.bridge.hooks(fwd_hooks=[self._replace(head)]):
            _, ablated = self.bridge.run_with_cache(self.tokens, names_filter=self.names)
        change = self.logit_change(head)
        heads, mlps = (
            after - before
            for after, before in zip(self._direct_effects(ablated), self._clean_effects, strict=True)
        )
        return {
            **change,
            "self_repair_heads": heads.sum((0, 1)) - heads[head],
            "self_repair_mlps": mlps.sum(0),
        }

    def _replace(self, head: Head) -> tuple[str, Callable[..., Tensor]]:
        layer, index = head
        name = f"blocks.{layer}.attn.hook_z"
        donated = self.clean[name][:, :, index].roll(len(self.tokens) // 2, dims=0)

        def replace(z: Float[Tensor, "prompt position head d_head"], hook: object) -> Tensor:
            z = z.clone()  # an edit in place can be lost without a word
            z[:, :, index] = donated
            return z

        return name, replace

    def _centred_correct_logit(
        self, logits: Float[Tensor, "prompt position d_vocab"]
    ) -> Float[Tensor, "prompt position-1"]:
        correct = logits[:, :-1].gather(-1, self.tokens[:, 1:, None])[..., 0]
        precise = torch.promote_types(logits.dtype, torch.float32)
        return correct.to(precise) - logits[:, :-1].mean(-1, dtype=precise)

    @cached_property
    def _direction(self) -> Float[Tensor, "prompt position-1 d_model"]:
        W_U = self.bridge.W_U
        return (W_U - W_U.mean(-1, keepdim=True)).T[self.tokens[:, 1:]] * self.bridge.ln_final.w

    @cached_property
    def _clean_effects(self) -> tuple[Tensor, Tensor]:
        return self._direct_effects(self.clean)

    def _direct_effects(self, cache: ActivationCache) -> tuple[Tensor, Tensor]:
        """With σ_clean, of every head ``[layer, head, prompt, position-1]`` and MLP ``[layer, …]``."""
        heads = self._read(cache.stack_head_results()).unflatten(0, (self.n_layers, self.n_heads))
        mlps = self._read(
            torch.stack([cache[f"blocks.{layer}.hook_mlp_out"] for layer in range(self.n_layers)])
        )
        return heads, mlps

    def _read(
        self, written: Float[Tensor, "part prompt position d_model"]
    ) -> Float[Tensor, "part prompt position-1"]:
        scaled = self.clean.apply_ln_to_stack(written, layer=-1)[..., :-1, :]
        return torch.einsum("cpkd,pkd->cpk", scaled, self._direction.to(scaled.dtype))


@torch.no_grad()
def plain_logit_change(
    model: Model, tokens: Int[Tensor, "prompt position"], head: Head
) -> Float[Tensor, "prompt position-1"]:
    """Change of the centred correct logit under resample ablation, from two passes of the plain model."""
    layer, index = head
    d_head = model.W_O(layer).shape[1]
    part = slice(index * d_head, (index + 1) * d_head)

    def replace(_: object, positional: tuple[Tensor]) -> tuple[Tensor]:
        z = positional[0].clone()
        z[..., part] = z[..., part].roll(
            len(tokens) // 2, dims=0
        )  # below the ablated head nothing has changed
        return (z,)

    def centred_correct_logit() -> Tensor:
        logits = model.hf(input_ids=tokens, use_cache=False).logits
        centred = logits - logits.mean(-1, keepdim=True)
        return centred[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]

    clean = centred_correct_logit()
    hook = model.output_projections[layer].register_forward_pre_hook(replace)
    try:
        return centred_correct_logit() - clean
    finally:
        hook.remove()
