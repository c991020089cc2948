"""What the notebooks share: a profile with the reader's changes, its sweeps, and where results go."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, get_origin, get_type_hints

import numpy as np
import pandas as pd
import xarray as xr
from filelock import FileLock
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from selfrepair.breakdown import heads_table
from selfrepair.claims import to_markdown
from selfrepair.corpora import Prompts, hash_documents, hash_tokenizer, load_tokens, read_documents
from selfrepair.devices import all_devices, resolve_device, set_precision
from selfrepair.manifest import manifest_of, write_manifest
from selfrepair.models import Model, load_model
from selfrepair.paths import HELD_OUT_TEXT, REPOSITORY
from selfrepair.profiles import Profile, load_profile
from selfrepair.results import (
    Shards,
    code_version,
    identity,
    kept,
    open_store,
    remove_unfinished,
    slug,
    store_name,
    write_atomically,
)
from selfrepair.sweep import CODE, Sweep, sweep

T = TypeVar("T")


@dataclass(frozen=True)
class Study:
    """A profile, a seed, a device and the folder that results go to."""

    profile: Profile
    seed: int
    device: str
    out_dir: Path

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
    ) -> Study:
        """The profile with whatever is not ``None`` in its place; results go to ``results/<profile>`` by default.

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
        folder = REPOSITORY / "results" / Path(profile).stem if out_dir is None else Path(out_dir)
        return cls(load_profile(profile).changed(**changes), seed, device, folder)

    def load(self, model: str) -> tuple[Model, Prompts]:
        """A model of the profile and the prompts to measure it on."""
        logging.disable_progress_bar()
        device = resolve_device(self.device)
        loaded = load_model(model, device, set_precision(self.profile.of_model(model).dtype, device))
        return loaded, self.prompts(model, loaded.tokenizer)

    def prompts(self, model: str, tokenizer: PreTrainedTokenizerBase) -> Prompts:
        """The prompts to measure a model on, from ``tokens/`` if they were drawn before: a hub dataset is read once."""
        p = self.profile.of_model(model)
        drawn = {"n_prompts": p.n_prompts, "prompt_len": p.prompt_len, "seed": self.seed}
        text = hash_documents(read_documents(HELD_OUT_TEXT)) if p.dataset is None else p.dataset
        attributes = {**drawn, "text": text, "tokenizer": hash_tokenizer(tokenizer)}
        shards = Shards(self.out_dir / "tokens")
        saved = shards.read(slug(model))
        if saved is None or str(saved["identity"]) != identity(attributes):
            found = load_tokens(tokenizer, dataset=p.dataset, **drawn)
            saved = {"tokens": found.tokens, "source": np.array(found.source), "identity": np.array(identity(attributes))}
            shards.write(slug(model), saved)
        return Prompts(saved["tokens"], str(saved["source"]))

    def tokens_file(self, model: str) -> Path:
        """Where :meth:`prompts` keeps the prompts of a model."""
        return self.out_dir / "tokens" / f"{slug(model)}.npz"

    def sweep(self, model: str, ablation: str, progress: bool = False) -> xr.Dataset:
        """The sweep of one model, from disk if it is there already."""
        return open_store(self.stored_sweep(model, ablation, progress))

    def stored_sweep(self, model: str, ablation: str, progress: bool = False) -> Path:
        """Where the sweep of one model lies, once it does."""
        return self._sweep(*self.load(model), ablation, progress)

    def planned_sweep(self, model: str, ablation: str) -> Sweep:
        """The sweep of one model, to compute some of its shards."""
        return Sweep(*self.load(model), ablation, self.out_dir / "sweeps", self.seed)

    def sweeps_by_ablation(self, model: str) -> dict[str, xr.Dataset]:
        """The sweeps of one model, which is loaded once, for every kind of ablation."""
        loaded, prompts = self.load(model)
        return {kind: open_store(self._sweep(loaded, prompts, kind)) for kind in self.profile.ablations}

    def _sweep(self, model: Model, prompts: Prompts, ablation: str, progress: bool = False) -> Path:
        return sweep(model, prompts, ablation, self.out_dir / "sweeps", self.seed, progress, all_devices(self.device)[1:])

    def sweeps(self, ablation: str) -> dict[str, xr.Dataset]:
        """The sweeps of every model."""
        return {model: self.sweep(model, ablation) for model in self.profile.models}

    def measure(self, what: Callable[..., T], model: str, *arguments: object) -> T:
        """``what(model, prompts, *arguments)`` for one model, from ``measured/`` if it was measured before.

        ``what`` is a function of the library that returns a dataclass of arrays, ints, and lists of ints or int tuples.
        """
        loaded, prompts = self.load(model)
        attributes = {
            "arguments": arguments,
            "weights_sha256": loaded.weights_hash(),
            "dtype": loaded.precision,
            "tokens_sha256": prompts.sha256,
            "code": code_version(f"{what.__module__.rpartition('.')[2]}.py", *CODE),
        }
        file = self.out_dir / "measured" / f"{store_name(loaded.name, what.__name__, attributes)}.npz"

        def compute() -> dict[str, np.ndarray]:
            remove_unfinished(manifest_of(file))
            started = time.monotonic()
            found = what(loaded, prompts, *arguments)
            write_manifest(manifest_of(file), time.monotonic() - started, source=loaded.source, measured=what.__name__, **attributes)
            return {name: np.asarray(value) for name, value in vars(found).items()}

        kind = get_type_hints(what)["return"]
        arrays = kept(file.parent, file.stem, compute)
        return kind(**{name: _as_hinted(arrays[name], hint) for name, hint in get_type_hints(kind).items()})

    def heads(self, sweeps: dict[str, xr.Dataset]) -> pd.DataFrame:
        """The heads tables of several models' sweeps, one under the other; also written to ``heads_<ablation>.csv``."""
        table = pd.concat([heads_table(s, self.profile.fraction) for s in sweeps.values()], ignore_index=True)
        (ablation,) = {s.attrs["ablation"] for s in sweeps.values()}
        write_atomically(self.out_dir / f"heads_{ablation}.csv", table.to_csv(index=False, float_format="%.6g").encode())
        return table

    def write_claims(self, table: pd.DataFrame) -> None:
        """Keeps one notebook's claims, and writes all notebooks' so far to ``figures/claims.csv`` and ``.md``."""
        parts = self.out_dir / "claims"
        (notebook,) = set(table["notebook"])
        parts.mkdir(parents=True, exist_ok=True)
        with FileLock(parts / "claims.lock"):  # notebooks may run side by side
            write_atomically(parts / f"{notebook}.csv", table.to_csv(index=False).encode())
            tables = [pd.read_csv(part, dtype=str, keep_default_na=False) for part in sorted(parts.glob("*.csv"))]
            whole = pd.concat(tables, ignore_index=True)
            folder = self.out_dir / "figures"
            write_atomically(folder / "claims.csv", whole.to_csv(index=False).encode())
            write_atomically(folder / "claims.md", (to_markdown(whole) + "\n").encode())


def _as_hinted(array: np.ndarray, hint: object) -> object:
    """A dataclass field as it was before it became an array."""
    if hint is int:
        return int(array)
    if get_origin(hint) is list:
        return [tuple(row) if isinstance(row, list) else row for row in array.tolist()]
    return array
