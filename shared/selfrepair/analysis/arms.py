"""What notebook 08 says of models that were trained alike but for dropout and seed: the table of arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from selfrepair.analysis.breakdown import PartMeans
from selfrepair.analysis.estimates import Estimate
from selfrepair.analysis.layer_means import LayerMeans
from selfrepair.paths import ARMS
from selfrepair.statistics import bootstrap_weights
from selfrepair.store.stores import open_store

#: What arms are measured on: heads and layers of this profile's text, and planted facts.
PROFILE = "pocket"
#: Bootstrap samples over prompts that are kept of every quantity of an arm.
N_BOOTSTRAP = 400
#: What is given back of the heads' direct effects, by which parts; all layers together.
SHARES = {
    "non-norm": ("heads", "mlps"),
    "heads": ("heads",),
    "mlps": ("mlps",),
    "layernorm": ("layernorm",),
    "self-repair": ("layernorm", "heads", "mlps"),
}
#: What layers downstream give back of the direct effects of ablated attention layers, by kind of prompts.
COMPENSATIONS = {"compensation-facts": "layers", "compensation-prose": "layers_on_prose"}
QUANTITIES = (*SHARES, *COMPENSATIONS)
#: What is known of an arm beside its effects, and the type that it is kept in; ``step`` is -1 at the end of
#: training.
KNOWN = {
    "name": object,
    "group": object,
    "step": np.int64,
    "dropout": np.float64,
    "head_dropout": np.float64,
    "attention_dropout_layer": np.float64,
    "seed": np.int64,
    "start": object,
    "tokens": np.int64,
    "loss_held_out_prose": np.float64,
    "fact_recall": np.float64,
    "weights_sha256": object,
    "made_on": object,
}
#: The groups of arms.yaml that are read by name.
FINE_TUNED, FROM_SCRATCH = "pocket-gpt2, fine-tuned", "gpt2 from scratch"
SHIPPED, OVER_TRAINING = "as shipped", "pocket-pythia over training"


@dataclass(frozen=True)
class Curve:
    """Arms of a ``group`` that differ in one kind of dropout (``dose``), beside those without any.

    The latter, its control, are of the group itself or of ``control``.
    """

    group: str
    dose: str = "head_dropout"
    control: str = ""

    def untreated(self, arms: xr.Dataset) -> xr.Dataset:
        """The arms without dropout."""
        group = self.control or self.group
        return where(arms, group=group, head_dropout=0, attention_dropout_layer=0)

    def arms(self, arms: xr.Dataset) -> xr.Dataset:
        """All arms of the curve, each once."""
        treated = where(arms, group=self.group)
        treated = treated.isel(arm=np.flatnonzero(treated[self.dose].values > 0))
        return xr.concat([self.untreated(arms), treated], "arm")


#: Those of notebook 08.
CURVES = {
    "gpt2, fine-tuned": Curve(FINE_TUNED),
    "gpt2, layers dropped": Curve(
        "pocket-gpt2, fine-tuned, layers dropped", "attention_dropout_layer", FINE_TUNED
    ),
    "gpt2, from scratch": Curve(FROM_SCRATCH),
    "pythia, fine-tuned": Curve("pocket-pythia, fine-tuned"),
}
#: The dropout at which claims are judged: the one that every group has.
CLAIMED_DOSE = 0.5
#: Columns of a value in the table of arms, by what they are called in comparisons.
ENDS = {"table": "", "low": "_low", "high": "_high"}


def effects_of_arm(
    sweep: xr.Dataset, layers: Mapping[str, xr.Dataset], fraction: float
) -> dict[str, Estimate]:
    """:data:`QUANTITIES` of one model, from its heads' sweep and its layers' measurements by name.

    Shares are ratios of sums over all heads (:meth:`PartMeans.restored`), each over its top ``fraction`` of
    tokens; compensation is :meth:`LayerMeans.compensation_share`, NaN where layers could not be measured.
    """
    means = PartMeans.of_sweep(sweep, fraction, N_BOOTSTRAP)
    found = {name: means.restored(parts) for name, parts in SHARES.items()}
    for name, measurement in COMPENSATIONS.items():
        found[name] = Estimate(np.full(1 + N_BOOTSTRAP, np.nan))
        if measurement in layers:
            of_layers = LayerMeans.of(layers[measurement], n_bootstrap=N_BOOTSTRAP)
            found[name] = of_layers.compensation_share()
    return found


def effects_of_models(
    sweeps: Mapping[str, xr.Dataset], layers: Mapping[str, Mapping[str, xr.Dataset]], fraction: float
) -> dict[str, dict[str, Estimate]]:
    """:func:`effects_of_arm` of several models; ``layers`` are by measurement, then by model."""
    return {
        model: effects_of_arm(
            sweep,
            {name: of_models[model] for name, of_models in layers.items() if model in of_models},
            fraction,
        )
        for model, sweep in sweeps.items()
    }


def arms_dataset(rows: Sequence[tuple[Mapping[str, object], Mapping[str, Estimate]]]) -> xr.Dataset:
    """``effect [arm, quantity, draw]`` of arms (draw 0 is the estimate), and what is :data:`KNOWN`."""
    effects = np.stack([[found[name].drawn for name in QUANTITIES] for _, found in rows])
    coords: dict[str, object] = {"quantity": np.array(QUANTITIES, dtype=object)}
    for name, kind in KNOWN.items():
        coords[name] = ("arm", np.array([known[name] for known, _ in rows], dtype=kind))
    return xr.Dataset({"effect": (("arm", "quantity", "draw"), effects.astype(np.float32))}, coords)


def arms_table(arms: xr.Dataset) -> pd.DataFrame:
    """One row per arm: what is known of it; each quantity with its 95% interval over prompts."""
    table = pd.DataFrame({name: arms[name].values for name in KNOWN})
    for quantity in QUANTITIES:
        found = effect_of(arms, quantity)
        low, high = found.interval()
        table = table.assign(**{quantity: found.value, f"{quantity}_low": low, f"{quantity}_high": high})
    return table


def read_arms(folder: Path = ARMS) -> xr.Dataset:
    """The arms that ``selfrepair arms`` has measured, as :func:`arms_dataset` gives them.

    Raises:
        UserError: the store is missing or damaged.
    """
    return open_store(folder / "arms.zarr").load()


def effect_of(arms: xr.Dataset, quantity: str) -> Estimate:
    """A quantity of every arm, ``[arm]``; samples draw prompts."""
    return Estimate(arms["effect"].sel(quantity=quantity).values.astype(np.float64))


def where(arms: xr.Dataset, **values: object) -> xr.Dataset:
    """The arms of which these things are known: ``group="as shipped"``, ``head_dropout=0.5``."""
    chosen = np.all([arms[name].values == value for name, value in values.items()], axis=0)
    return arms.isel(arm=np.flatnonzero(chosen))


def over_seeds(effects: Float[np.ndarray, "seed draw"], seed: int = 0) -> Estimate:
    """Mean over training seeds; samples draw prompts and, with replacement, seeds."""
    n_seeds, n_drawn = effects.shape
    weights = np.concatenate([np.ones((1, n_seeds)), bootstrap_weights(n_seeds, n_drawn - 1, seed)])
    return Estimate((effects * weights.T).sum(0) / n_seeds)


def against_control(arms: xr.Dataset, control: xr.Dataset, quantity: str) -> Estimate:
    """A quantity of arms less that of their controls of the same seed, mean over the seeds that both have.

    Both arms of a seed are drawn together. Prose is the same for all arms; facts are those that each answers.
    """
    seeds = np.intersect1d(arms["seed"].values, control["seed"].values)
    order = [
        [int(np.flatnonzero(some["seed"].values == seed)[0]) for seed in seeds] for some in (arms, control)
    ]
    treated, untreated = (
        effect_of(some, quantity).drawn[chosen] for some, chosen in zip((arms, control), order, strict=True)
    )
    return over_seeds(treated - untreated)


def dose_curve(arms: xr.Dataset, dose: str) -> pd.DataFrame:
    """``dose, quantity, estimate, low, high, n_arms``: means over arms, one of each seed, at each dose of
    dropout."""
    tables = []
    for at in np.unique(arms[dose].values):
        here = where(arms, **{dose: at})
        for quantity in QUANTITIES:
            about = {"dose": float(at), "quantity": quantity, "n_arms": here.sizes["arm"]}
            tables.append(over_seeds(effect_of(here, quantity).drawn).table({}, **about))
    return pd.concat(tables, ignore_index=True)


def dose_curves(arms: xr.Dataset) -> dict[str, pd.DataFrame]:
    """:func:`dose_curve` of every one of :data:`CURVES`, by its name."""
    return {name: dose_curve(curve.arms(arms), curve.dose) for name, curve in CURVES.items()}


def at_dose(curves: Mapping[str, pd.DataFrame], quantity: str) -> pd.DataFrame:
    """Means of a quantity over seeds: a row for each curve, a column for each dose of dropout."""
    rows = {name: curve[curve["quantity"] == quantity].set_index("dose") for name, curve in curves.items()}
    table = pd.DataFrame({name: of_curve["estimate"] for name, of_curve in rows.items()}).T
    return table.rename_axis(index="group", columns="dropout")


def mean_of(arms: xr.Dataset, group: str, column: str) -> dict[float, float]:
    """Means over seeds of a column of the arms' table, by head dropout, of one group."""
    table = arms_table(where(arms, group=group))
    return table.groupby("head_dropout")[column].mean().to_dict()


def between_curves(arms: xr.Dataset, first: str, second: str, dose: float, quantity: str) -> Estimate:
    """A quantity of one of :data:`CURVES` less that of another at one dose: :func:`against_control`."""
    of_first, of_second = (
        where(arms, group=curve.group, **{curve.dose: dose}) for curve in (CURVES[first], CURVES[second])
    )
    return against_control(of_first, of_second, quantity)


def claimed(arms: xr.Dataset) -> dict[str, dict[str, Estimate]]:
    """What the claims of notebook 08 are about, by curve of head dropout: at :data:`CLAIMED_DOSE`."""
    found = {}
    for name, curve in CURVES.items():
        if curve.dose == "head_dropout":
            treated = where(arms, group=curve.group, head_dropout=CLAIMED_DOSE)
            found[name] = {
                f"head-dropout-gain-{quantity}": against_control(treated, curve.untreated(arms), quantity)
                for quantity in ("non-norm", *COMPENSATIONS)
            }
            level = over_seeds(effect_of(treated, "non-norm").drawn)
            found[name]["head-dropout-level-non-norm"] = level
    return found


def compared(effects: Mapping[str, Mapping[str, Estimate]], arms: xr.Dataset) -> pd.DataFrame:
    """Quantities measured now, by model, beside those of the arms as shipped of the same name.

    Columns ``model, quantity, now, table, low, high``: the interval is the table's.
    """
    tables = []
    shipped = arms_table(where(arms, group=SHIPPED)).set_index("name")
    for model, found in effects.items():
        if model not in shipped.index:
            continue
        for quantity, estimate in found.items():
            row = {name: shipped.loc[model, f"{quantity}{end}"] for name, end in ENDS.items()}
            tables.append({"model": model, "quantity": quantity, "now": float(estimate.value)} | row)
    return pd.DataFrame(tables, columns=["model", "quantity", "now", *ENDS])
