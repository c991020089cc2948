"""What is said of layers' effects, counted by hand on made-up data, and drawn for models of any depth."""

import statistics

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_rgb

from selfrepair.analysis.layer_means import LayerMeans
from selfrepair.analysis.layers import (
    PUBLISHED,
    LayerRun,
    balance,
    best_layers,
    by_phrasing,
    late_mlps,
    over_training,
    prompts_table,
    reactions,
    statistics_of_models,
    statistics_table,
    unembedding_larger,
)
from selfrepair.analysis.layers import statistics as layer_statistics
from selfrepair.analysis.rules import load_claims, load_statistics
from selfrepair.analysis.worked_prompt import worked_prompt, worked_table
from selfrepair.measure.layer_ablation import downstream
from selfrepair.plots import layer_compensation, layers, style
from selfrepair.statistics import bootstrap_weights

BY_FIT = ("direct_effect", "compensation")
BY_PROMPT = ("effect", "total_effect", "norm_term", *BY_FIT)


def correlation(x, y):
    return np.corrcoef(x, y)[0, 1]


def slope_of(x, y):
    return np.polyfit(x, y, 1)[0]


def made_up_facts(n_prompts=9):
    return xr.Dataset(
        attrs={
            "texts": [f"prompt {i}" for i in range(n_prompts)],
            "answers": [" answer"] * n_prompts,
            "phrasings": ["trained" if i % 2 else "held out" for i in range(n_prompts)],
            **{"n_asked": n_prompts, "n_answered": n_prompts},
        }
    )


def made_up_effects(n_layers=6, n_prompts=9, parallel=False, seed=0, without_dropout=True):
    rng = np.random.default_rng(seed)
    c = 2 * n_layers
    change = rng.normal(size=(c, n_prompts, c)) * downstream(n_layers, parallel)[:, None]
    data = {
        name: (("ablated", "prompt"), rng.normal(1, 1, size=(c, n_prompts)))
        for name in ("direct_effect", "total_effect", "norm_term")
    }
    data["compensation"] = (("ablated", "prompt"), change.sum(-1))
    data["change"] = (("ablated", "prompt", "observed"), change)
    data["effect"] = (("prompt", "observed"), rng.normal(size=(n_prompts, c)))
    data["downstream"] = (("ablated", "observed"), downstream(n_layers, parallel))
    data["n_donors"] = ("prompt", np.full(n_prompts, 15))
    how = {"ablation": "resample", "layer_positions": "last"}
    return xr.Dataset(data, attrs={"model": "fake", "trained_without_dropout": without_dropout, **how})


class ByHand:
    """The claims' statistics from plain loops over prompts, of which one may come twice."""

    def __init__(self, effects, n_layers, parallel):
        self.effects, self.n_layers, self.parallel = effects, n_layers, parallel
        self.later = range(n_layers // 2, n_layers)
        self.late = [2 * layer + 1 for layer in range(2 * n_layers // 3, n_layers)]

    def values(self, name, component, prompts):
        return [float(self.effects[name].transpose(..., "prompt")[component, i]) for i in prompts]

    def changes(self, ablated, observed, prompts):
        change = self.effects["change"].transpose("ablated", "observed", "prompt")
        return [float(change[ablated, observed, i]) for i in prompts]

    def mean(self, name, component, prompts):
        return statistics.fmean(self.values(name, component, prompts))

    def attention_above(self, layer):
        return [2 * other for other in range(layer + 1, self.n_layers)]

    def coupled(self, prompts, size_of):
        """Mean over layers of the share of attention above whose ``size_of(ablated, observed)`` is large."""
        shares = []
        for layer in range(self.n_layers - 1):
            own = statistics.fmean(map(abs, self.values("direct_effect", 2 * layer, prompts)))
            sizes = [size_of(2 * layer, other) for other in self.attention_above(layer)]
            shares.append(statistics.fmean(size > 0.1 * own for size in sizes))
        return statistics.fmean(shares)

    def correlation(self, component, prompts):
        x, y = (self.values(name, component, prompts) for name in ("direct_effect", "compensation"))
        return statistics.correlation(x, y)

    def best(self, prompts):
        """Attention of the later half, with attention above, whose compensation goes most with its effect."""
        some_above = [2 * layer for layer in self.later if layer < self.n_layers - 1]
        return max(some_above, key=lambda a: self.correlation(a, prompts))

    def strongest_below(self, component, prompts):
        below = [2 * layer for layer in range(component // 2 + (not self.parallel))]
        return max(below, key=lambda a: self.mean("direct_effect", a, prompts))

    def all(self, prompts, even, odd):
        """``prompts`` for what is of all; what is chosen on ``even`` is read off ``odd``."""
        pairs = [
            x > y
            for layer in range(self.n_layers)
            for x, y in zip(
                self.values("effect", 2 * layer, prompts),
                self.values("total_effect", 2 * layer, prompts),
                strict=True,
            )
        ]
        above = [2 * layer for layer in self.later if layer < self.n_layers - 1]
        given = sum(self.mean("compensation", a, prompts) for a in above) / sum(
            self.mean("direct_effect", a, prompts) for a in above
        )
        best = self.best(even)
        x, y = (self.values(name, best, odd) for name in ("direct_effect", "compensation"))
        correlation = statistics.correlation(x, y)
        erasing = [m for m in self.late if self.mean("effect", m, even) < 0]
        ablated = self.strongest_below(erasing[0], even)
        weakened = sum(statistics.fmean(self.changes(ablated, m, odd)) for m in erasing)
        return {
            "unembedding-larger": statistics.fmean(pairs),
            "downstream-compensation": given,
            "downstream-compensation-without-dropout": given,
            "best-layer-slope": statistics.linear_regression(x, y).slope,
            "best-layer-r2": correlation * abs(correlation),
            "coupled-attention": self.coupled(
                prompts, lambda a, o: statistics.fmean(map(abs, self.changes(a, o, prompts)))
            ),
            "coupled-attention-replaced": self.coupled(
                prompts, lambda _, o: statistics.fmean(map(abs, self.values("direct_effect", o, prompts)))
            ),
            "late-mlps-effect": statistics.fmean(self.mean("effect", m, prompts) for m in self.late),
            "erasing-mlps-change": weakened / self.mean("direct_effect", ablated, odd),
        }


@pytest.mark.parametrize("condition", ("facts", "prose"))
@pytest.mark.parametrize("parallel", (False, True))
def test_claims_by_hand(parallel, condition):
    n, n_bootstrap = 13, 4
    effects = made_up_effects(n_prompts=n, parallel=parallel, seed=3)
    found = layer_statistics(LayerRun.of(condition, effects, n_bootstrap))
    by_hand = ByHand(effects, 6, parallel)
    drawn = [range(n)]
    drawn += [[i for i, k in enumerate(w) for _ in range(int(k))] for w in bootstrap_weights(n, n_bootstrap)]
    for sample, prompts in enumerate(drawn):
        wanted = by_hand.all(prompts, range(0, n, 2), [i for i in prompts if i % 2])
        assert {name.removesuffix(f"-{condition}") for name in found} == set(wanted)
        for name, value in wanted.items():
            assert found[f"{name}-{condition}"].drawn[sample] == pytest.approx(value), (name, sample)
    claimed = {claim.statistic for claim in load_claims() if claim.notebook == "06"}
    assert {name for name in claimed if name.endswith(condition)} == set(found) - {
        f"coupled-attention-replaced-{condition}"
    }


def test_every_statistic_is_known_and_published_ones_are_claimed():
    runs = [LayerRun.of(condition, made_up_effects(seed=3), 2) for condition in ("facts", "prose")]
    (found,) = statistics_of_models(runs).values()
    assert set(found) <= set(load_statistics()) and len(found) == 2 * len(layer_statistics(runs[0]))
    claimed = {claim.statistic for claim in load_claims()}
    assert all(set(of_model) <= claimed for of_model in PUBLISHED.values())


def test_tables_by_hand():
    effects = made_up_effects(seed=3)
    effects["effect"][:, :10] = abs(effects["effect"][:, :10])  # attention 5 and MLP 5 may lower the token
    run, by_hand, every = LayerRun.of("facts", effects, 20), ByHand(effects, 6, False), range(9)
    pairs = [(2 * layer, o) for layer in range(6) for o in range(2 * layer + 1, 12)]
    falls = sum(statistics.fmean(by_hand.changes(a, o, every)) < 0 for a, o in pairs)
    takes = sum(by_hand.mean("compensation", 2 * layer, every) < 0 for layer in range(6))
    (row,) = reactions([run]).to_dict("records")
    assert row == {
        **{"condition": "facts", "model": "fake", "pairs": len(pairs), "falls": falls},
        **{"layers": 6, "takes away": takes},
    }
    ablated = by_hand.strongest_below(9, range(0, 9, 2))
    for row, component in zip(late_mlps([run]).to_dict("records"), (9, 11), strict=True):
        raw = by_hand.mean("effect", component, every)
        change = statistics.fmean(by_hand.changes(ablated, component, every))
        assert (row["condition"], row["model"], row["layer"]) == ("facts", "fake", component // 2)
        assert [row["raw"], row["ablated"]] == pytest.approx([raw, raw + change])
        assert row["centred"] == pytest.approx(by_hand.mean("direct_effect", component, every))
    (larger,) = unembedding_larger([run]).to_dict("records")
    found = statistics_of_models([run])
    assert larger["share"] == found["fake"]["unembedding-larger-facts"].value
    assert larger["low"] < larger["share"] < larger["high"]
    table = statistics_table(
        found | {"other": {"late-mlps-effect-facts": found["fake"]["late-mlps-effect-facts"]}}
    )
    assert table.loc["late-mlps-effect-facts", "other"] == run.means.effect.value[[9, 11]].mean()
    assert np.isnan(table.loc["unembedding-larger-facts", "other"])


def test_what_is_left_out():
    """Too few layers, no late MLP that lowers the token, trained with dropout or nobody knows how."""
    few = layer_statistics(LayerRun.of("facts", made_up_effects(n_layers=2, seed=1), 4))
    assert not {"downstream-compensation-facts", "best-layer-slope-facts"} & set(few)
    assert "coupled-attention-facts" in few
    raising = made_up_effects(without_dropout=False)
    raising["effect"] = abs(raising["effect"])
    found = layer_statistics(LayerRun.of("facts", raising, 4))
    assert {"late-mlps-effect-facts", "downstream-compensation-facts"} <= set(found)
    left_out = {"erasing-mlps-change-facts", "downstream-compensation-without-dropout-facts"}
    assert not left_out & set(found)


def test_the_best_attention_is_one_of_those_whose_share_is_counted():
    """Not the last, above which is one MLP alone, nor an early one, however well they fit."""
    effects = made_up_effects(n_prompts=40)
    for component in (0, 10):
        effects["compensation"][component] = 2 * effects["direct_effect"][component]
    run = LayerRun.of("facts", effects, n_bootstrap=2)
    r_squared = run.choosing.compensation_fit.r_squared.value
    assert r_squared[0] == r_squared[10] == pytest.approx(1)
    assert run.best("attention") == max((6, 8), key=lambda a: r_squared[a])


def test_no_draw_chooses_its_own_layer():
    """The layer with the largest direct effect is chosen once, whatever a draw has."""
    effects = made_up_effects(n_prompts=40)
    effects["direct_effect"][:] = np.random.default_rng(5).normal(0, 1, size=(12, 40))
    effects["effect"][:] = -1.0
    run = LayerRun.of("facts", effects, n_bootstrap=50)
    ablated, mlps = run.strongest_below_late_mlps(), run.means.late_mlps()
    found = layer_statistics(run)["erasing-mlps-change-facts"]
    wanted = run.reading.change[ablated, mlps].sum() / run.reading.direct_effect[ablated]
    np.testing.assert_allclose(found.drawn, wanted.drawn)


def test_means_of_some_prompts():
    """A table of all quantities by part and layer; what comes of attention and MLPs lies on either side."""
    effects = made_up_effects()
    even = [0, 2, 4, 6, 8]
    part = LayerMeans.of(effects, np.arange(9) % 2 == 0, n_bootstrap=3)
    assert part.n_prompts == 5
    table = part.by_layer(condition="facts").set_index(["condition", "part", "layer", "quantity"])["estimate"]
    change = effects["change"].values[:, even].mean(1)  # [ablated, observed]
    for component in range(12):
        name, layer = ("attention", "MLP")[component % 2], component // 2
        of = {key: effects[key].transpose(..., "prompt").values[component][even] for key in BY_PROMPT}
        agreement, r = correlation(of["effect"], of["total_effect"]), np.nan
        if component < 11:  # nothing is downstream of the last
            r = correlation(of["direct_effect"], of["compensation"])
        wanted = {key: values.mean() for key, values in of.items()} | {
            "unembedding_larger": (of["effect"] > of["total_effect"]).mean(),
            "compensation_by_attention": sum(change[component, other] for other in range(0, 12, 2)),
            "compensation_by_mlps": sum(change[component, other] for other in range(1, 12, 2)),
            "agreement_r_squared": agreement * abs(agreement),
            "compensation_r_squared": r * abs(r),
        }
        if component < 11:
            wanted["compensation_slope"] = slope_of(of["direct_effect"], of["compensation"])
        found = {key: table["facts", name, layer, key] for key in wanted}
        assert found == pytest.approx(wanted, nan_ok=True), (name, layer)


@pytest.mark.parametrize(("change", "is_touched"), [(5e-6, False), (1e-3, True), (0.05, True)])
def test_changes_of_rounding_touch_nothing(change, is_touched):
    """However small the direct effect is, of which a tenth would be less."""
    effects = made_up_effects()
    effects["direct_effect"][:] = 1e-5
    effects["change"][:] = change * effects["downstream"]
    shares = LayerMeans.of(effects, n_bootstrap=0).coupling("attention").value
    assert shares[:-1].tolist() == [float(is_touched)] * 5 and np.isnan(shares[-1])


def test_from_the_unembedding_to_the_ablation():
    """Means over attention layers 3 to 5 of 6."""
    effects = made_up_effects(seed=3)
    (row,) = balance([LayerRun.of("facts", effects, 5)]).to_dict("records")
    change = effects["change"].values.mean(1)
    mean = {
        name: np.mean([effects[name].transpose(..., "prompt").values[c].mean() for c in (6, 8, 10)])
        for name in BY_PROMPT
    }
    wanted = {
        "unembedding-based": mean["effect"],
        "mean part": mean["effect"] - mean["direct_effect"],
        "direct effect": mean["direct_effect"],
        "by attention": np.mean([change[c, 0::2].sum() for c in (6, 8, 10)]),
        "by MLPs": np.mean([change[c, 1::2].sum() for c in (6, 8, 10)]),
        "by the final norm": mean["norm_term"],
        "ablation-based": mean["total_effect"],
    }
    assert {name: row[name] for name in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize("seed", [0, 3])
def test_the_best_layers_are_chosen_on_one_half_and_read_off_the_other(seed):
    effects = made_up_effects(n_prompts=14, seed=seed)

    def signed(component, prompts):
        r = correlation(*(effects[name].values[component][prompts] for name in BY_FIT))
        return r * abs(r)

    table = best_layers([LayerRun.of("prose", effects, 5)])
    assert len(table) == 4
    for part, candidates in (("attention", (6, 8)), ("MLP", range(1, 11, 2))):
        best = max(candidates, key=lambda component: signed(component, slice(0, None, 2)))
        rows = table[table["ablated"] == f"{part} {best // 2}"].set_index("quantity")["estimate"]
        x, y = (effects[name].values[best][1::2] for name in BY_FIT)
        assert rows.to_dict() == pytest.approx(
            {"slope": slope_of(x, y), "R²": signed(best, slice(1, None, 2))}
        )


def test_a_layer_that_is_not_given_back_is_not_the_best():
    """Its line explains everything, downwards."""
    effects = made_up_effects(n_prompts=20)
    effects["compensation"][6] = -2 * effects["direct_effect"][6]
    run = LayerRun.of("facts", effects, n_bootstrap=0)
    assert (
        run.choosing.compensation_fit.r_squared.value[6] == pytest.approx(-1) and run.best("attention") == 8
    )


def test_phrasings_are_counted_apart():
    effects = made_up_effects()
    table = by_phrasing(LayerRun.of("facts", effects, 5), made_up_facts()).set_index("phrasing")
    for phrasing, prompts in (("held out", slice(0, None, 2)), ("trained", slice(1, None, 2))):
        direct, given = (sum(effects[name].values[c][prompts].mean() for c in (6, 8)) for name in BY_FIT)
        row = table.loc[phrasing, ["direct effect", "compensation", "compensation over direct effect"]]
        assert row.tolist() == pytest.approx([direct, given, given / direct])


def test_donors_and_their_spread_are_means_over_prompts_and_attention_layers():
    effects, rng = made_up_effects(), np.random.default_rng(7)
    spread, donors = rng.gamma(2, size=(12, 9)), np.arange(9)
    effects["total_effect_spread"], effects["n_donors"] = (("ablated", "prompt"), spread), ("prompt", donors)
    (row,) = prompts_table([LayerRun.of("prose", effects, 2)], {}).to_dict("records")
    assert row["spread between donors"] == pytest.approx(spread[::2].mean()) and row["donors"] == 4
    assert row["size of the effect"] == pytest.approx(np.abs(effects["total_effect"].values[::2]).mean())


def test_effects_over_training_by_loops():
    steps = [made_up_effects(seed=seed) for seed in (1, 2)]
    answered = np.random.default_rng(8).integers(0, 2, size=(2, 9))
    effects = xr.concat(steps, "step").assign_coords(step=[4, 70])
    effects["answered"] = (("step", "prompt"), answered)
    table = over_training(effects).set_index(["step", "quantity"])["estimate"]
    for number, (step, here) in enumerate(zip((4, 70), steps, strict=True)):
        of = {name: here[name].transpose(..., "prompt").values for name in BY_PROMPT}
        wanted = {
            "answered": answered[number].mean(),
            "direct effect": of["direct_effect"][[6, 8]].mean(),
            "total effect": of["total_effect"][[6, 8]].mean(),
            "compensation": of["compensation"][[6, 8]].mean(),
            "late MLPs": of["effect"][[9, 11]].mean(),
        }
        assert table[step].to_dict() == pytest.approx(wanted)


def drawn(runs):
    return (
        draw(runs)
        for draw in (
            layers.effects_by_layer,
            layers.ablation_against_unembedding,
            layers.unembedding_larger,
            layers.downstream_change,
            layers.late_mlps,
            layer_compensation.compensation_scatter,
            layer_compensation.compensation_by_layer,
            layer_compensation.compensation_split,
            layer_compensation.coupling,
        )
    )


@pytest.mark.slow("models of any depth get statistics and figures")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("sizes", "conditions"), [([1], ["facts"]), ([1, 2, 3], ["facts", "prose"]), ([24], ["prose"])]
)
def test_models_of_any_depth_are_counted_and_drawn(sizes, conditions):
    """One parallel block, in which nothing is downstream of attention, up to more layers than labels fit."""
    runs = []
    for condition in conditions:
        for n in sizes:
            effects = made_up_effects(n_layers=n, parallel=n == 1).assign_attrs(model=f"{n} layers")
            run = LayerRun.of(condition, effects.assign(clean_logit=("prompt", np.ones(9))), n_bootstrap=4)
            found = layer_statistics(run)
            assert all(np.isfinite(estimate.value) for estimate in found.values())
            assert by_phrasing(run, made_up_facts())["prompts"].tolist() == [5, 4]
            worked_table(run, worked_prompt(run, made_up_facts()))
            runs.append(run)
    assert len(best_layers(runs)) == 2 * len(conditions) * sum({1: 0, 2: 1, 3: 1}.get(n, 2) for n in sizes)
    style.use_style()
    for figure in drawn(runs):
        figure.canvas.draw()
        plt.close(figure)


def test_a_model_without_one_condition_leaves_its_panel_empty():
    runs = [
        LayerRun.of(condition, made_up_effects().assign_attrs(model=name), 2)
        for condition, name in (("facts", "a"), ("facts", "b"), ("prose", "a"))
    ]
    axes = layers.late_mlps(runs).axes
    assert [axis.axison for axis in axes] == [True, True, True, False]
    plt.close("all")


def test_figures_show_the_means():
    run = LayerRun.of("facts", made_up_effects(), n_bootstrap=4)
    means = run.means
    lines = layers.effects_by_layer([run]).axes[1].containers
    np.testing.assert_allclose(lines[0][0].get_ydata(orig=False), means.effect.value[1::2])
    np.testing.assert_allclose(lines[1][0].get_ydata(orig=False), means.total_effect.value[1::2])
    image = layers.downstream_change([run]).axes[0].images[0].get_array()
    assert image[2, 5] == means.change.value[4, 5] and np.ma.getmaskarray(np.ma.masked_invalid(image))[2, 4]
    raw, centred, ablated = layers.late_mlps([run]).axes[0].containers
    last = means.effect.value[11] + means.change.value[run.strongest_below_late_mlps(), 11]
    np.testing.assert_allclose(raw[0].get_ydata(orig=False), means.effect.value[1::2])
    np.testing.assert_allclose(centred[0].get_ydata(orig=False), means.direct_effect.value[1::2])
    assert ablated[0].get_ydata(orig=False)[-1] == pytest.approx(last)
    axis = layer_compensation.compensation_split([run]).axes[0]
    total = sum(bar.get_height() for bars in axis.containers for bar in list(bars)[2:3])
    assert total == pytest.approx(means.compensation.value[4] + means.norm_term.value[4])
    plt.close("all")


def ends_of(bars, axis=1):
    """The two ends of each bar along ``axis``, out of the lines of an error bar's container."""
    return np.array([segment[:, axis] for segment in bars[min(axis, len(bars) - 1)].get_segments()])


def test_bars_by_layer_end_where_intervals_do():
    run = LayerRun.of("facts", made_up_effects(), n_bootstrap=50)
    for axis, first in zip(layers.effects_by_layer([run]).axes, (0, 1), strict=True):
        for bars, estimate in zip(axis.containers, (run.means.effect, run.means.total_effect), strict=True):
            np.testing.assert_allclose(ends_of(bars[2]), np.stack(estimate[first::2].interval(), 1))
    plt.close("all")


def test_layers_that_change_by_more_than_every_threshold_are_drawn():
    run = LayerRun.of("facts", made_up_effects(), n_bootstrap=4)
    change, direct = run.effects["change"].values, run.effects["direct_effect"].values
    (axis,) = layer_compensation.coupling([run], 5).axes
    lines = {line.get_label(): line for line in axis.lines}
    for offset, part in enumerate(("attention", "MLP")):
        wanted = []
        for threshold in (0.01, 0.01 * 10**0.75, 0.01 * 10**1.5, 0.01 * 10**2.25, 10):
            shares = []
            for ablated in range(0, 12, 2):
                least = threshold * np.abs(direct[ablated]).mean()
                below = range(ablated + 1 + (offset == 0), 12)
                sizes = [np.abs(change[ablated, :, o]).mean() for o in below if o % 2 == offset]
                shares += [np.mean([size > least for size in sizes])] if sizes else []
            wanted.append(np.mean(shares))
        np.testing.assert_allclose(lines[part].get_xdata()[[0, -1]], [0.01, 10])
        np.testing.assert_allclose(lines[part].get_ydata(), wanted)
        assert 0 < np.ptp(wanted)
    plt.close("all")


def test_compensation_stands_above_the_direct_effect():
    """Prompts that the layer is chosen on are grey, those of the line blue."""
    run = LayerRun.of("facts", made_up_effects(), n_bootstrap=50)
    (axis,) = layer_compensation.compensation_scatter([run]).axes
    points = np.stack([run.effects[name].values[run.best("attention")] for name in BY_FIT], 1)
    for label, colour, prompts in (
        ("prompts that the layer is chosen on", "0.6", slice(0, None, 2)),
        ("prompts of line, slope and R²", "C0", slice(1, None, 2)),
    ):
        (shown,) = (one for one in axis.collections if one.get_label() == label)
        np.testing.assert_allclose(shown.get_offsets(), points[prompts])
        np.testing.assert_allclose(shown.get_facecolor()[0, :3], to_rgb(colour))
    (line,) = (line for line in axis.lines if line.get_label() == "regression")
    slope, constant = np.polyfit(*points[1::2].T, 1)
    np.testing.assert_allclose(line.get_ydata(), slope * line.get_xdata() + constant)
    by_layer = layer_compensation.compensation_by_layer([run]).axes[0].containers[0]
    means = [run.effects[name].values[:11:2].mean(1) for name in BY_FIT]
    np.testing.assert_allclose(by_layer[0].get_xydata(), np.stack(means, 1))
    for number, estimate in enumerate((run.means.direct_effect, run.means.compensation)):
        ends = ends_of(by_layer[2], number)
        np.testing.assert_allclose(ends, np.stack(estimate[:11:2].interval(), 1))
    plt.close("all")
