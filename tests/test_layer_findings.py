"""What notebook 06 counts in its tables of layers, counted again by plain loops on made-up numbers."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from test_layer_means import made_up_effects, made_up_facts

from selfrepair.analysis import layers
from selfrepair.analysis.layer_findings import (
    AS_BEFORE,
    clear_slopes,
    late_mlp_changes,
    phrasings_apart,
    sides,
    where_means_agree,
)
from selfrepair.analysis.worked_prompt import worked_prompt, worked_table
from selfrepair.plots.worked_prompt import worked_prompt as draw_worked_prompt


@pytest.fixture(scope="module")
def runs():
    return [
        layers.LayerRun.of(condition, made_up_effects(seed=seed).assign_attrs(model=name), 20)
        for seed, (condition, name) in enumerate([("facts", "a"), ("facts", "b"), ("prose", "a")])
    ]


def test_a_side_needs_the_whole_interval():
    larger = pd.DataFrame(
        [("facts", "a", 0.51, 0.9), ("facts", "b", 0.1, 0.49), ("prose", "a", 0.5, 0.9)],
        columns=["condition", "model", "low", "high"],
    )
    assert sides(larger).to_dict() == {
        ("facts", "a"): "more",
        ("facts", "b"): "less",
        ("prose", "a"): "either",
    }


def test_means_agree_where_their_parts_sum_to_more_than_nothing(runs):
    larger, balance = layers.unembedding_larger(runs), layers.balance(runs)
    larger["low"], larger["high"] = [0.6, 0.6, 0.4], [0.9, 0.9, 0.6]
    found = where_means_agree(larger, balance)
    assert found.index.tolist() == [("facts", "a"), ("facts", "b")]
    for run, (_, row) in zip(runs, found.iterrows(), strict=False):
        effects = run.effects.transpose("ablated", "observed", "prompt")
        above, later, norm = [], [], []
        for layer in (3, 4, 5):
            for prompt in range(9):
                here = effects.isel(ablated=2 * layer, prompt=prompt)
                own = float(effects["effect"][2 * layer, prompt])
                above.append(own - float(here["direct_effect"]))
                later.append(float(here["change"].sum()))
                norm.append(float(here["norm_term"]))
        means = [np.mean(part) for part in (above, later, norm)]
        assert row[["mean part", "later layers", "final norm"]].tolist() == pytest.approx(means)
    difference = (balance["unembedding-based"] - balance["ablation-based"]).iloc[:2]
    assert found["in means"].tolist() == (difference > 0).tolist()


def test_clear_slopes_are_counted_by_part(runs):
    best = layers.best_layers(runs)
    is_slope, is_attention = best["quantity"] == "slope", best["ablated"].str.startswith("attention")
    best.loc[is_slope, "low"] = -0.1
    clear = is_slope & is_attention & (best["condition"] == "facts")
    best.loc[clear & (best["model"] == "a"), "low"] = 0.01
    best.loc[best["quantity"] == "R²", "low"] = 0.3  # no slope
    found = clear_slopes(best)
    assert found[["layers", "clear"]].to_dict("index") == {
        ("facts", "attention"): {"layers": 2, "clear": 1},
        ("facts", "MLP"): {"layers": 2, "clear": 0},
        ("prose", "attention"): {"layers": 1, "clear": 0},
        ("prose", "MLP"): {"layers": 1, "clear": 0},
    }
    fit, own = runs[0].reading.compensation_fit, runs[0].best("attention")
    assert found.loc[("facts", "attention"), "largest R²"] == fit.r_squared.value[own]
    assert found["largest R²"].isna().sum() == 3


def test_phrasings_overlap_where_one_value_lies_in_every_interval():
    rows = [
        *(("a", "trained", -2.0, -2.5, -1.5), ("a", "held out", -2.4, -3.0, -1.9)),
        *(("b", "trained", 0.5, 0.4, 0.6), ("b", "held out", 0.1, 0.0, 0.2)),
    ]
    columns = ["model", "phrasing", "compensation over direct effect", "low", "high"]
    found = phrasings_apart(pd.DataFrame(rows, columns=columns))
    assert found["apart"].to_dict() == pytest.approx({"a": 0.4, "b": 0.4})
    assert found["overlap"].to_dict() == {"a": True, "b": False}


@pytest.mark.parametrize(
    ("raw", "ablated", "lowers", "changes", "turns"),
    [
        (1.0, 1.0 + 0.9 * AS_BEFORE, False, "as before", False),
        (1.0, 1.0 + 1.1 * AS_BEFORE, False, "more", False),
        (1.0, 1.0 - 1.1 * AS_BEFORE, False, "less", False),
        (0.5, -0.1, False, "less", True),
        (-0.5, -0.1, True, "more", False),
        (0.5, np.nan, False, "as before", False),
    ],
)
def test_late_mlps_change_by_more_than_a_little(raw, ablated, lowers, changes, turns):
    about = {"condition": "facts", "model": "a", "layer": 4}
    late = pd.DataFrame([about | {"raw": raw, "centred": 0.1, "ablated": ablated}])
    (row,) = late_mlp_changes(late).to_dict("records")
    assert row == about | {"lowers": lowers, "changes": changes, "turns": turns}


@pytest.mark.parametrize(("n_donors", "said"), [(15, ", mean of 15 donors"), (1, "")])
def test_the_worked_prompt_says_of_which_model_and_how(n_donors, said):
    effects = made_up_effects().assign(
        clean_logit=("prompt", np.ones(9)), n_donors=("prompt", np.full(9, n_donors))
    )
    run = layers.LayerRun.of("facts", effects, 4)
    worked = worked_prompt(run, made_up_facts())
    table = worked_table(run, worked)
    part = table["part"][worked.component + 1]
    figure = draw_worked_prompt(table, part, worked)
    said_above = " ".join(figure.get_suptitle().split())
    assert said_above == f"fake; {part}: resample ablation at the last position{said}"
    plt.close(figure)
