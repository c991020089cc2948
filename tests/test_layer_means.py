"""What is said of layers' effects, counted by hand on made-up data, and drawn for models of any depth."""

import statistics

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from selfrepair.analysis.claims import load_claims
from selfrepair.analysis.layer_means import LayerMeans
from selfrepair.analysis.layers import FactRun, worked_prompt, worked_table
from selfrepair.analysis.layers import statistics as layer_statistics
from selfrepair.measure.layers import downstream
from selfrepair.plots import layers as plots
from selfrepair.plots import style
from selfrepair.statistics import bootstrap_weights


def made_up_facts(n_prompts=9):
    return xr.Dataset(
        attrs={
            "texts": [f"prompt {i}" for i in range(n_prompts)],
            "answers": [" answer"] * n_prompts,
            "phrasings": ["trained" if i % 2 else "held out" for i in range(n_prompts)],
            **{"n_asked": n_prompts, "n_answered": n_prompts, "n_alone": 0},
        }
    )


def made_up_effects(n_layers=6, n_prompts=9, parallel=False, seed=0):
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
    return xr.Dataset(data, attrs={"model": "fake"})


def by_hand(effects, prompts, n_layers, parallel):
    """The claims' statistics from plain loops over the prompts (one may come twice)."""

    def values(name, component):
        return [float(effects[name].transpose(..., "prompt")[component, i]) for i in prompts]

    def changes(ablated, observed):
        return [
            float(effects["change"].transpose("ablated", "observed", "prompt")[ablated, observed, i])
            for i in prompts
        ]

    def mean(name, component):
        return statistics.fmean(values(name, component))

    later = range(n_layers // 2, n_layers)
    above = [2 * layer for layer in later if layer < n_layers - 1]
    late = [2 * layer + 1 for layer in range(2 * n_layers // 3, n_layers)]
    couplings = []
    for layer in range(n_layers):
        below = [o for o in range(2 * n_layers) if o // 2 > layer or (not parallel and o == 2 * layer + 1)]
        if below:
            size = statistics.fmean(map(abs, values("direct_effect", 2 * layer)))
            couplings.append(
                statistics.fmean(
                    statistics.fmean(map(abs, changes(2 * layer, o))) > 0.1 * size for o in below
                )
            )
    candidates = [2 * layer for layer in range(n_layers) if layer < late[0] // 2 + (not parallel)]
    strongest = max(candidates, key=lambda component: mean("direct_effect", component))
    given = sum(mean("compensation", a) for a in above) / sum(mean("direct_effect", a) for a in above)
    return [
        sum(mean("total_effect", 2 * layer) for layer in later)
        / sum(mean("effect", 2 * layer) for layer in later),
        given,
        statistics.fmean(
            float(np.polyfit(values("direct_effect", a), values("compensation", a), 1)[0]) for a in above
        ),
        statistics.fmean(couplings),
        statistics.fmean(mean("effect", o) for o in late),
        sum(statistics.fmean(changes(strongest, o)) for o in late) / mean("direct_effect", strongest),
        given,
    ]


@pytest.mark.parametrize("parallel", (False, True))
def test_claims_by_hand(parallel):
    effects = made_up_effects(parallel=parallel)
    statistics_of = layer_statistics(LayerMeans.of(effects, n_bootstrap=4, seed=7), without_dropout=True)
    names = [claim.statistic for claim in load_claims() if claim.notebook == "06"]
    assert set(statistics_of) == set(names) and len(names) == 7
    draws = [
        range(9),
        *([i for i, k in enumerate(w) for _ in range(int(k))] for w in bootstrap_weights(9, 4, 7)),
    ]
    for sample, prompts in enumerate(draws):
        wanted = by_hand(effects, prompts, 6, parallel)
        assert [statistics_of[name].drawn[sample] for name in names] == pytest.approx(wanted), sample
    unknown = layer_statistics(LayerMeans.of(effects, n_bootstrap=4), without_dropout=False)
    assert set(names) - set(unknown) == {names[-1]} == {"downstream-compensation-without-dropout"}


def test_few_layers_leave_statistics_out():
    found = layer_statistics(LayerMeans.of(made_up_effects(n_layers=2), n_bootstrap=4), without_dropout=True)
    assert len(found) == 4 and all(np.isfinite(estimate.drawn).all() for estimate in found.values())


def test_means_of_some_prompts():
    effects = made_up_effects()
    some = np.arange(9) % 2 == 0
    part = LayerMeans.of(effects, some, n_bootstrap=3)
    assert part.n_prompts == 5
    assert part.effect.value[3] == pytest.approx(
        statistics.fmean(float(effects["effect"][i, 3]) for i in (0, 2, 4, 6, 8))
    )
    table = part.by_layer().set_index(["part", "layer", "quantity"])["estimate"]
    assert table["MLP", 1, "effect"] == pytest.approx(part.effect.value[3])
    assert table["attention", 4, "slope"] == pytest.approx(part.slope.value[8])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sizes", ([1], [1, 2, 3], [24]))
def test_models_of_any_depth_are_counted_and_drawn(sizes):
    """One parallel block, in which nothing is downstream of attention, up to more layers than labels fit."""
    runs = []
    for n in sizes:
        effects = made_up_effects(n_layers=n, parallel=n == 1).assign_attrs(model=f"{n} layers")
        effects = effects.assign(clean_logit=("prompt", np.ones(9)))
        run = FactRun.of(made_up_facts(), effects, n_bootstrap=4)
        found = layer_statistics(run.means, True)
        assert all(np.isfinite(estimate.drawn).all() for estimate in found.values())
        assert len(found) == {1: 2, 2: 4, 3: 4, 24: 7}[n]
        assert run.by_phrasing()["prompts"].tolist() == [5, 4]
        worked_table(run, worked_prompt(run))
        runs.append(run)
    style.use_style()
    for draw in (
        plots.effects_by_layer,
        plots.ablation_against_unembedding,
        plots.downstream_change,
        plots.compensation_scatter,
        plots.compensation_slopes,
        plots.coupling,
        plots.late_mlps,
    ):
        figure = draw(runs)
        figure.canvas.draw()
        plt.close(figure)


def test_figures_show_the_means():
    run = FactRun.of(made_up_facts(), made_up_effects(), n_bootstrap=4)
    means = run.means
    lines = plots.effects_by_layer([run]).axes[1].containers
    np.testing.assert_allclose(lines[0][0].get_ydata(orig=False), means.effect.value[1::2])
    np.testing.assert_allclose(lines[1][0].get_ydata(orig=False), means.total_effect.value[1::2])
    image = plots.downstream_change([run]).axes[0].images[0].get_array()
    assert image[2, 5] == means.change.value[4, 5] and np.ma.getmaskarray(np.ma.masked_invalid(image))[2, 4]
    clean, ablated = plots.late_mlps([run]).axes[0].containers
    last = means.effect.value[11] + means.change.value[means.strongest_below_late_mlps()[0], 11]
    np.testing.assert_allclose(clean[0].get_ydata(orig=False), means.effect.value[1::2])
    assert ablated[0].get_ydata(orig=False)[-1] == pytest.approx(last)
    plt.close("all")
