"""Every head of a model ablated on every prompt: the suite's main measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import xarray as xr

from selfrepair.engine.head_ablation import ablate_pairs
from selfrepair.errors import UserError
from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.measure.pairs import (
    head_replacement,
    needs_of_ablation,
    pair_shards,
    prompts_of_shard,
    tokens_of,
)

if TYPE_CHECKING:
    from selfrepair.models.loading import Model


class Heads(Measurement):
    """What :class:`~selfrepair.engine.head_ablation.HeadAblations` holds (logits).

    ``[layer, head, prompt, position]``; beside them ``sigma_clean [prompt, position]`` and
    ``token [prompt, token_position]``. Rushing & Nanda 2024, §2 and §3.
    """

    name: ClassVar[str] = "heads"
    uses: ClassVar[tuple[str, ...]] = ("dtype", "ablation")
    every_ablation: ClassVar[bool] = True

    def needs(self, settings: Settings) -> tuple[str, ...]:
        return needs_of_ablation(settings)

    def shards(self, settings: Settings) -> Sequence[int]:
        return pair_shards(settings)

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        prompts = prompts_of_shard(inputs, shard)
        tokens = tokens_of(model, inputs, prompts)
        found = ablate_pairs(model, tokens, head_replacement(model, settings, inputs))
        if not all(values.isfinite().all() for values in vars(found).values()):
            raise UserError(
                f"{model.name}: some effects are not finite; the weights are damaged or {model.dtype} "
                f"is too narrow for them"
            )
        dims = ("layer", "head", "prompt", "position")
        variables = {name: (dims[-values.ndim :], values.numpy()) for name, values in vars(found).items()}
        variables["token"] = (("prompt", "token_position"), tokens.numpy())
        n_prompts = inputs["tokens"].sizes["prompt"]
        coords = {
            "prompt": prompts,
            "donor": ("prompt", (prompts + n_prompts // 2) % n_prompts),
            "position": np.arange(tokens.shape[1] - 1),
        }
        return xr.Dataset(variables, coords, {"corpus": str(inputs["tokens"].attrs["corpus"])})


MEASUREMENT = Heads()
