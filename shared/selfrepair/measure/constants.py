"""What fitted ablations put in the place of every head: learnt once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import torch
import xarray as xr

from selfrepair.engine.ablations import Constants, find_ablation
from selfrepair.engine.identity_check import check_tokens
from selfrepair.engine.sites import HEADS, batches_that_fit
from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.measure.unseen_tokens import learnt_from, needs_of_fit

if TYPE_CHECKING:
    from selfrepair.models.loading import Model


class FittedConstants(Measurement):
    """``z [layer, head, d_head]``, in float64."""

    name: ClassVar[str] = "constants"
    uses: ClassVar[tuple[str, ...]] = ("dtype", "ablation")
    on_demand: ClassVar[bool] = True

    def needs(self, settings: Settings) -> tuple[str, ...]:
        return ("tokens", *needs_of_fit(settings))

    def shards(self, settings: Settings) -> Sequence[int]:
        return [0]

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        tokens = torch.from_numpy(inputs["tokens"]["token"].values).to(model.device)
        check_tokens(model, tokens, str(inputs["tokens"].attrs["corpus"]))
        ablation = find_ablation(str(settings["ablation"]))
        batches = learnt_from(model, settings, inputs, list(batches_that_fit(model, tokens)))
        if ablation.fits_unseen:
            check_tokens(model, batches[0], str(inputs["tokens"].attrs["corpus"]))
        constants = ablation.prepare(model, batches, HEADS)
        z = torch.stack(list(cast(Constants, constants).values)).double().cpu().numpy()
        return xr.Dataset({"z": (("layer", "head", "d_head"), z)})


MEASUREMENT = FittedConstants()
