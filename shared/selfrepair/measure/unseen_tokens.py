"""Prompts that nothing is measured on: what ablations learn from that must not know what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from selfrepair.engine.ablations import find_ablation
from selfrepair.engine.optimal import N_PROMPTS
from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.measure.tokens import MEASUREMENT as TOKENS
from selfrepair.text.corpora import Prompts, load_tokens

if TYPE_CHECKING:
    from selfrepair.models.loading import Model


class UnseenTokens(Measurement):
    """``token [prompt, token_position]``: other prompts of the corpus than those of ``tokens``."""

    name: ClassVar[str] = "unseen_tokens"
    uses: ClassVar[tuple[str, ...]] = TOKENS.uses
    on_demand: ClassVar[bool] = True
    needs_network: ClassVar[bool] = True

    def needs(self, settings: Settings) -> tuple[str, ...]:
        return ()

    def fingerprint(self, settings: Settings) -> dict[str, object]:
        return TOKENS.fingerprint(settings)

    def shards(self, settings: Settings) -> Sequence[int]:
        return [0]

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        source = {name: settings[name] for name in self.uses}
        return of_unseen(load_tokens(model.tokenizer, **source, n_unseen=N_PROMPTS))


MEASUREMENT = UnseenTokens()


def of_unseen(prompts: Prompts) -> xr.Dataset:
    """The unseen ones of prompts, as this measurement gives them."""
    token = (("prompt", "token_position"), prompts.unseen)
    return xr.Dataset({"token": token}, attrs={"corpus": prompts.source})


def needs_of_fit(settings: Settings) -> tuple[str, ...]:
    """What an ablation learns from that does not learn from the prompts that it is measured on."""
    return ("unseen_tokens",) if find_ablation(str(settings["ablation"])).fits_unseen else ()


def learnt_from(
    model: Model, settings: Settings, inputs: Inputs, measured: Sequence[Int[Tensor, "_ _"]]
) -> Sequence[Int[Tensor, "prompt position"]]:
    """What the settings' ablation learns from: the prompts that are ``measured`` on, unless it must not."""
    if not needs_of_fit(settings):
        return measured
    return [torch.from_numpy(inputs["unseen_tokens"]["token"].values).to(model.device)]
