"""What notebooks share: a profile with the reader's changes, what was measured of it, where results go."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from selfrepair.errors import NotMeasurable, UserError
from selfrepair.measure.measurement import find_measurement, measurement_names
from selfrepair.measure.task import Task
from selfrepair.models.checkpoints import find_model, short_name, whole_name
from selfrepair.paths import BY_HAND, PROFILES
from selfrepair.run.profiles import (
    POSSIBLE,
    Possible,
    Profile,
    load_profile,
    refuse_impossible,
    whole_profile,
)
from selfrepair.store.files import identity, slug
from selfrepair.store.stores import open_store

#: Identity of the settings whose results the committed notebooks describe, those of the pocket profile:
#: nothing is said of them once its file is edited.
DESCRIBED = "058f75da077c"
#: Facts that layers are measured on, unless the reader says how many.
N_FACTS = 200

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from selfrepair.models.loading import Model


@dataclass(frozen=True)
class Study:
    """A profile, a seed, a device and the folder that results go to.

    ``head``, ``facts`` and ``n_facts`` are what notebooks let a reader choose beside the profile's settings;
    ``None``: by rule. ``run_folder`` is that of the run whose stores are read where they are there, and never
    written to; ``None``: only those in ``out_dir``.
    """

    profile: Profile
    seed: int
    device: str
    out_dir: Path
    head: tuple[int, int] | None = None
    facts: str | None = None
    n_facts: int | None = None
    run_folder: Path | None = None

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
        """The profile with what is not ``None`` in its place.

        A run's folder belongs to the run. Without ``out_dir``, results go to ``results/by-hand/<profile>``,
        or to another folder there for each set of changes (:func:`_folder_by_hand`); what the profile's run
        has measured is read from the run.

        Raises:
            UserError: as :func:`load_profile`, a value that cannot be, or two models of the same name.
        """
        given = {
            "profile": profile,
            "model": model,
            "seed": seed,
            "device": device,
            "out_dir": out_dir,
            "head": head,
            "facts": facts,
            "n_facts": n_facts,
        }
        refuse_impossible({name: value for name, value in given.items() if value is not None}, _OF_READERS)
        changes: dict[str, Any] = {}
        if model is not None:
            changes["models"] = [whole_name(model)]
        if ablation is not None:
            changes["ablations"] = [ablation]
        if n_prompts is not None:
            changes["n_prompts"] = n_prompts
        if fraction is not None:
            changes["fraction"] = fraction
        refuse_impossible({name: changes[name] for name in changes.keys() & POSSIBLE.keys()}, POSSIBLE)
        whole = load_profile(profile).changed(**changes)
        _refuse_equal_names(whole.models)
        facts = os.path.abspath(facts) if facts is not None and os.path.exists(facts) else facts
        one_head = None if head is None else (head[0], head[1])
        if out_dir is not None:
            return cls(whole, seed, device, Path(out_dir), one_head, facts, n_facts)
        beside = {"seed": seed or None, "head": head, "facts": facts, "n_facts": n_facts}
        folder = _folder_by_hand(profile, whole.name, changes | beside)
        return cls(whole, seed, device, folder, one_head, facts, n_facts, run_folder=whole.run_folder)

    @property
    def is_as_committed(self) -> bool:
        """Whether results are those that the committed notebooks describe: the pocket profile, unchanged."""
        settings = identity(dataclasses.asdict(self.profile))
        own = (settings, self.seed, self.head, self.facts, self.n_facts)
        return own == (DESCRIBED, 0, None, None, None)

    def of_first_model(self) -> Study:
        """The same of the profile's first model alone."""
        return dataclasses.replace(self, profile=self.profile.of_model(self.profile.models[0]))

    def wanted(self, model_name: str, ablation: str) -> dict[str, Any]:
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
            "donor_draws": own.donor_draws,
            "head": None if self.head is None else list(self.head),
            "facts": self.facts,
            "n_facts": N_FACTS if self.n_facts is None else self.n_facts,
        }

    def task(self, name: str, model_name: str, ablation: str | None = None) -> Task:
        """One measurement of one model, by default for the profile's first kind of ablation.

        It is the run's where the run has made it.
        """
        wanted = self.wanted(model_name, self.profile.ablations[0] if ablation is None else ablation)
        if self.run_folder is not None:
            of_the_run = Task(name, model_name, wanted, self.run_folder / "measured")
            if of_the_run.is_done():
                return of_the_run
        return Task(name, model_name, wanted, self.out_dir / "measured")

    def each(self, name: str) -> Iterator[tuple[str, str]]:
        """``(model, ablation)`` of every store of a measurement in a run of the profile."""
        for model_name in self._measurable(name):
            kinds = self.profile.of_model(model_name).ablations
            for ablation in kinds if find_measurement(name).every_ablation else kinds[:1]:
                yield model_name, ablation

    def _measurable(self, name: str) -> list[str]:
        """The models that there is something to measure of."""
        applies_to, first = find_measurement(name).applies_to, self.profile.ablations[0]
        return [
            model
            for model in self.profile.models
            if applies_to({**self.wanted(model, first), "model_name": model})
        ]

    def tasks(self, model_name: str) -> Iterator[Task]:
        """Everything that a run of the profile measures of a model."""
        for name in measurement_names():
            if not find_measurement(name).on_demand:
                for _, ablation in filter(lambda pair: pair[0] == model_name, self.each(name)):
                    yield self.task(name, model_name, ablation)

    def measured(self, name: str, ablation: str | None = None) -> dict[str, xr.Dataset]:
        """What was measured of every model that has it, by short name; measured now if need be.

        A kind of ``ablation`` that some models have beside the profile's is measured of these alone, one that
        the profile does not have at all of every model. Of several models, one that it cannot be measured of
        is left out, which is said.

        Raises:
            NotMeasurable: it cannot be measured of any model.
            UserError: as the measurement says.
        """
        models = self._measurable(name)
        if ablation in self.profile.kinds:
            models = [model for model in models if ablation in self.profile.of_model(model).ablations]
        tasks = {model: self.task(name, model, ablation) for model in models}
        found: dict[str, xr.Dataset] = {}
        left_out: list[NotMeasurable] = []
        for model_name, task in tasks.items():
            try:
                if not task.is_done():
                    task.merge(self.load(model_name))
            except NotMeasurable as error:  # facts of a model that answers none, for instance
                left_out.append(error)
            else:
                found[short_name(model_name)] = open_store(task.path)
        if left_out and not found:
            raise left_out[0]
        for why in left_out:
            print(f"left out of {name}: {why}")
        return found

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


def _is_text(value: object) -> bool:
    return isinstance(value, str | os.PathLike) and str(value) != ""


def _is_head(value: Any) -> bool:
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    return is_pair and all(type(number) is int and number >= 0 for number in value)


#: What a reader may give beside a profile's settings.
_OF_READERS: Possible = {
    "profile": (_is_text, "the name of a profile or the path of a .yaml file"),
    "model": (lambda value: isinstance(value, str) and value != "", "the name of a model, or its folder"),
    "seed": (lambda value: type(value) is int and value >= 0, "a whole number that is not negative"),
    "device": (lambda value: isinstance(value, str), "auto, cpu, cuda, cuda:1 …"),
    "out_dir": (_is_text, "the path of a folder"),
    "head": (_is_head, "[layer, head], two whole numbers that are not negative"),
    "facts": (_is_text, "a CounterFact .json or a data set"),
    "n_facts": (lambda value: type(value) is int and value >= 2, "a whole number of at least 2"),
}


def with_needs(tasks: Sequence[Task]) -> list[Task]:
    """The tasks and all that they need, each once."""
    found: dict[Path, Task] = {}
    pending = list(tasks)
    while pending:
        task = pending.pop(0)
        found.setdefault(task.path, task)
        pending += task.needed.values()
    return list(found.values())


def model_slug(model_name: str) -> str:
    """What a model is called in names of files: no two models of a profile have the same."""
    return slug(short_name(model_name))


def _folder_by_hand(profile: str, name: str, changes: Mapping[str, Any]) -> Path:
    """``results/by-hand/<name>``; with a hash of the changes where there are any, so that none meet."""
    made = {key: value for key, value in changes.items() if value is not None}
    if Path(whole_profile(profile)).parent not in (Path(), PROFILES):
        made["profile"] = whole_profile(profile)
    of_models = [model_slug(model) for model in made.get("models", [])]
    return BY_HAND / "-".join([name, *of_models, *([identity(made)] if made else [])])


def _refuse_equal_names(models: Sequence[str]) -> None:
    """Refuses models of one name: they would be pooled, and have the same files."""
    short = [model_slug(model) for model in models]
    for name, model in zip(short, models, strict=True):
        if short.count(name) > 1:
            raise UserError(
                f"{model}: another model of the profile is called {name} too; rename one of the folders"
            )
