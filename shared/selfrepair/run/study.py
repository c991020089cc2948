"""What notebooks share: a profile with the reader's changes, what was measured of it, where results go."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xarray as xr

from selfrepair.errors import UserError
from selfrepair.measure.measurement import find_measurement, measurement_names
from selfrepair.measure.task import Task
from selfrepair.models.checkpoints import find_model, short_name
from selfrepair.paths import REPOSITORY
from selfrepair.run.profiles import Profile, load_profile
from selfrepair.store.stores import open_store

#: Facts that layers are measured on, unless the reader says how many.
N_FACTS = 200

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from selfrepair.models.loading import Model


@dataclass(frozen=True)
class Study:
    """A profile, a seed, a device and the folder that results go to.

    ``head``, ``facts`` and ``n_facts`` are what notebooks let a reader choose beside the profile's settings;
    ``None``: by rule.
    """

    profile: Profile
    seed: int
    device: str
    out_dir: Path
    head: tuple[int, int] | None = None
    facts: str | None = None
    n_facts: int | None = None

    @classmethod
    def of(
        cls,
        profile: str = "pocket",
        model: str | None = None,
        n_prompts: int | None = None,
        seed: int = 0,
        device: str = "auto",
        ablation: str | None = None,
        fraction: float | None = None,
        out_dir: str | Path | None = None,
        head: Sequence[int] | None = None,
        facts: str | None = None,
        n_facts: int | None = None,
    ) -> Study:
        """The profile with what is not ``None`` in its place; by default into ``results/<profile>``.

        Raises:
            UserError: as :func:`load_profile`.
        """
        changes: dict[str, object] = {}
        if model is not None:
            changes["models"] = [model]
        if ablation is not None:
            changes["ablations"] = [ablation]
        if n_prompts is not None:
            changes["n_prompts"] = n_prompts
        if fraction is not None:
            changes["fraction"] = fraction
        whole = load_profile(profile).changed(**changes)
        _refuse_equal_names(whole.models)
        folder = REPOSITORY / "results" / whole.name if out_dir is None else Path(out_dir)
        return cls(whole, seed, device, folder, None if head is None else tuple(head), facts, n_facts)

    @property
    def is_as_committed(self) -> bool:
        """Whether results are those that the committed notebooks describe: the pocket profile, unchanged."""
        return (self.profile, self.seed, self.head, self.facts, self.n_facts) == (
            load_profile("pocket"),
            0,
            None,
            None,
            None,
        )

    def of_first_model(self) -> Study:
        """The same of the profile's first model alone."""
        return dataclasses.replace(self, profile=self.profile.of_model(self.profile.models[0]))

    def wanted(self, model_name: str, ablation: str) -> dict[str, object]:
        """Every setting that a measurement of the model may use."""
        own = self.profile.of_model(model_name)
        return {
            "n_prompts": own.n_prompts,
            "prompt_len": own.prompt_len,
            "dataset": own.dataset,
            "text": None,
            "tokens": None,
            "seed": self.seed,
            "dtype": own.dtype,
            "fraction": own.fraction,
            "ablation": ablation,
            "layer_positions": own.layer_positions,
            "head": None if self.head is None else list(self.head),
            "facts": self.facts,
            "n_facts": N_FACTS if self.n_facts is None else self.n_facts,
        }

    def task(self, name: str, model_name: str, ablation: str | None = None) -> Task:
        """One measurement of one model, by default for the profile's first kind of ablation."""
        wanted = self.wanted(model_name, self.profile.ablations[0] if ablation is None else ablation)
        return Task(name, model_name, wanted, self.out_dir / "measured")

    def each(self, name: str) -> Iterator[tuple[str, str]]:
        """``(model, ablation)`` of every store of a measurement in a run of the profile."""
        measurement = find_measurement(name)
        for model_name in self.profile.models:
            if measurement.applies_to(model_name):
                for ablation in (
                    self.profile.ablations if measurement.every_ablation else self.profile.ablations[:1]
                ):
                    yield model_name, ablation

    def tasks(self, model_name: str) -> Iterator[Task]:
        """Everything that a run of the profile measures of a model."""
        for name in measurement_names():
            if not find_measurement(name).on_demand:
                for _, ablation in filter(lambda pair: pair[0] == model_name, self.each(name)):
                    yield self.task(name, model_name, ablation)

    def measured(self, name: str, ablation: str | None = None) -> dict[str, xr.Dataset]:
        """What was measured of every model that has it, by short name; measured now if need be."""
        applies = find_measurement(name).applies_to
        tasks = {model: self.task(name, model, ablation) for model in self.profile.models if applies(model)}
        for model_name, task in tasks.items():
            if not task.is_done():
                task.merge(self.load(model_name))
        return {short_name(model_name): open_store(task.path) for model_name, task in tasks.items()}

    def load(self, model_name: str) -> list[Model]:
        """A model of the profile, once for every device that shares the work."""
        from transformers.utils import logging

        from selfrepair.models.devices import all_devices, set_precision
        from selfrepair.models.loading import load_model

        logging.disable_progress_bar()
        devices = all_devices(self.device)
        dtype = set_precision(self.profile.of_model(model_name).dtype, devices[0])
        return [load_model(model_name, device, dtype) for device in devices]

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """The tokenizer of a model of the profile, by its name or its short one."""
        from transformers import AutoTokenizer

        (model_name,) = {model for model in self.profile.models if name in (model, short_name(model))}
        return AutoTokenizer.from_pretrained(find_model(model_name), trust_remote_code=False)


def _refuse_equal_names(models: Sequence[str]) -> None:
    """Refuses models that would be pooled because their folders have the same name."""
    short = [short_name(model) for model in models]
    for name, model in zip(short, models, strict=True):
        if short.count(name) > 1:
            raise UserError(
                f"{model}: another model of the profile is called {name} too; rename one of the folders"
            )
