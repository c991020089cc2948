"""What layers contribute at each saved checkpoint of a model's training, and who compensates for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import xarray as xr

from selfrepair.engine.fast import fast_path
from selfrepair.measure.facts import of_facts
from selfrepair.measure.layer_ablation import ablate_on_facts
from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.measure.unseen_tokens import needs_of_fit
from selfrepair.models.checkpoints import checkpoints, model_identity
from selfrepair.text.facts import choose_prompts, facts_for, facts_identity

if TYPE_CHECKING:
    from selfrepair.models.loading import Model

#: Most prompts on which checkpoints are compared.
N_OVER_TRAINING = 64


class LayersOverTraining(Measurement):
    """What :func:`~selfrepair.measure.layer_ablation.ablate_on_facts` gives, at each training ``step``.

    The prompts are the same at each step, drawn whether they are answered or not: effects are on whatever
    token the checkpoint itself finds most likely. A shard is a checkpoint, its number the step.
    """

    name: ClassVar[str] = "layers_over_training"
    uses: ClassVar[tuple[str, ...]] = (
        *("model_name", "dtype", "ablation", "layer_positions"),
        *("facts", "n_facts", "seed"),
    )
    along: ClassVar[str] = "step"

    def needs(self, settings: Settings) -> tuple[str, ...]:
        return needs_of_fit(settings)

    def applies_to(self, settings: Settings) -> bool:
        return bool(checkpoints(str(settings["model_name"])))

    def fingerprint(self, settings: Settings) -> dict[str, object]:
        model_name = str(settings["model_name"])
        saved = {str(saved.step): model_identity(saved.model_name) for saved in checkpoints(model_name)}
        return {**facts_identity(model_name, settings["facts"]), "checkpoints": saved}

    def shards(self, settings: Settings) -> Sequence[int]:
        return [saved.step for saved in checkpoints(str(settings["model_name"]))]

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        name, seed = str(settings["model_name"]), int(settings["seed"])
        n_prompts = min(int(settings["n_facts"]), N_OVER_TRAINING)
        prompts = choose_prompts(
            model, facts_for(name, settings["facts"]), n_prompts, seed, only_answered=False
        )
        (saved,) = (saved.model_name for saved in checkpoints(name) if saved.step == shard)
        at_step = model if saved == name else _load(saved, model)
        with fast_path(at_step, on=model.fast) as at_step:
            measured = ablate_on_facts(at_step, of_facts(prompts), settings, inputs)
        return measured.expand_dims(step=[shard])


MEASUREMENT = LayersOverTraining()


def _load(checkpoint: str, model: Model) -> Model:
    """A checkpoint, on the device and in the precision of the model that it became."""
    from transformers.utils import logging

    from selfrepair.models.loading import load_model

    logging.disable_progress_bar()
    return load_model(checkpoint, model.device, model.dtype)
