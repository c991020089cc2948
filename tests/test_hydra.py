"""The Hydra effect against a slow float64 reference, a model whose compensation is planted, and counts by hand."""

import json
import shutil
import statistics

import matplotlib.pyplot as plt
import numpy as np
import pytest
import reference
import torch
import xarray as xr
from families import ALL_FAMILIES, VOCAB
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from selfrepair.analysis import layers as hydra
from selfrepair.analysis.claims import load_claims
from selfrepair.errors import UserError
from selfrepair.text.facts import AskedFact, FactPrompts, draw_donors, facts_for
from selfrepair.analysis.layers import LayerMeans, ablate_layers, hydra_statistics, layer_effects
from selfrepair.store.manifest import manifest_of
from selfrepair.models.loading import load_model
from selfrepair.paths import MODELS
from selfrepair.plots import layers as plots
from selfrepair.plots import style
from selfrepair.engine.ablations import ABLATIONS
from selfrepair.statistics import bootstrap_weights
from selfrepair.run.verify import verify

SCALARS = ("direct_effect", "total_effect", "compensation", "norm_term")


def made_up_prompts(sizes=((5, 12), (3, 9)), vocab=VOCAB, seed=0):
    """Random prompts, ``sizes`` = (how many, how long) of each length."""
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(vocab, size=length).tolist() for n, length in sizes for _ in range(n)]
    ends = np.cumsum([n for n, _ in sizes])
    groups = [np.arange(end - n, end) for end, (n, _) in zip(ends, sizes, strict=True)]
    n = len(tokens)
    facts = [AskedFact(f"prompt {i}", " answer", "relation", "trained" if i % 2 else "held out") for i in range(n)]
    return FactPrompts(facts, tokens, rng.integers(3, size=n), groups, n, n, 0)


# ---------------------------------------------------------------- the slow way


@torch.no_grad()
def run(hf, tokens, replace=None):
    """One prompt through the whole model, with ``replace = (component, output)``; outputs of all components, final residual, logits."""
    blocks, projections, norm = reference._parts(hf)
    modules = [module for pair in zip(projections, reference.mlp_projections(hf), strict=True) for module in pair]
    residuals, attention, handles = [], {}, []
    for block in blocks:
        handles.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs: residuals.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
        )
    handles.append(norm.register_forward_pre_hook(lambda _, args: residuals.append(args[0])))
    if replace is not None:
        handles.append(modules[replace[0]].register_forward_hook(lambda *_: replace[1]))
    for layer, projection in enumerate(projections):
        handles.append(projection.register_forward_hook(lambda _, __, output, layer=layer: attention.__setitem__(layer, output)))
    try:
        logits = hf(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    outputs = []
    for layer in range(len(blocks)):
        outputs += [attention[layer], residuals[layer + 1] - residuals[layer] - attention[layer]]
    return outputs, residuals[-1][0, -1], logits - logits.mean()


@torch.no_grad()
def slowly(hf, prompts, ablation, seed):
    """Every quantity, one full forward pass per component and donor: lists over (component, prompt) of lists over donors."""
    clean = [run(hf, tokens) for tokens in prompts.tokens]
    n_components = len(clean[0][0])
    norm = reference._parts(hf)[2]
    W_U = hf.get_output_embeddings().weight

    def effect(written, sigma, token):
        if type(norm).__name__ == "LayerNorm":
            written = written - written.mean()
        logits = W_U @ (norm.weight * written / sigma)
        return (logits - logits.mean())[token]

    donors = {i: [None] for i in range(len(prompts.tokens))}
    if ablation == "resample":
        donors = {i: [] for i in donors}
        for number, members in enumerate(prompts.groups):
            for i, j in draw_donors(prompts.answers[members], hydra.N_DONORS, seed + number):
                donors[int(members[i])].append(int(members[j]))
    means = [torch.cat([outputs[c][0] for outputs, _, _ in clean]).mean(0) for c in range(n_components)]
    found = {}
    for i, (outputs, final, logits) in enumerate(clean):
        token = int(logits.argmax())
        sigma = reference.sigma(hf, final)
        constant = logits[token] - effect(final, sigma, token)
        own = [effect(output[0, -1], sigma, token) for output in outputs]
        for c in range(n_components):
            for donor in donors[i]:
                new = {"resample": lambda: clean[donor][0][c], "mean": lambda: means[c].expand_as(outputs[c])}  # noqa: B023
                new = new.get(ablation, lambda: torch.zeros_like(outputs[c]))()  # noqa: B023
                ablated, ablated_final, ablated_logits = run(hf, prompts.tokens[i], (c, new))
                change = [effect(output[0, -1], sigma, token) - before for output, before in zip(ablated, own, strict=True)]
                change[c] = torch.tensor(0.0)
                row = {
                    "effect": own[c],
                    "direct_effect": own[c] - effect(new[0, -1], sigma, token),
                    "total_effect": logits[token] - ablated_logits[token],
                    "compensation": sum(change),
                    "norm_term": ablated_logits[token] - effect(ablated_final, sigma, token) - constant,
                    "change": change,
                    "token": token,
                }
                found.setdefault((c, i), []).append(row)
    return found


def check(measured, found, tolerance):
    measured = measured.transpose("ablated", "observed", "prompt")
    for (c, i), rows in found.items():
        scale = max(1.0, *(abs(float(row["total_effect"])) for row in rows))
        assert int(measured["token"][i]) == rows[0]["token"]
        assert abs(float(measured["effect"][c, i]) - float(rows[0]["effect"])) < tolerance * scale
        assert int(measured["n_donors"][i]) == len(rows)
        for name in SCALARS:
            values = [float(row[name]) for row in rows]
            assert abs(float(measured[name][c, i]) - statistics.fmean(values)) < tolerance * scale, (c, i, name)
            spread = float(measured[f"{name}_spread"][c, i])
            if len(values) > 1:
                assert abs(spread - statistics.stdev(values)) < 3 * tolerance * scale
            else:
                assert np.isnan(spread)
        for observed in range(len(rows[0]["change"])):
            wanted = statistics.fmean(float(row["change"][observed]) for row in rows)
            assert abs(float(measured["change"][c, observed, i]) - wanted) < tolerance * scale, (c, observed, i)


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_equals_full_forward_passes(family, name):
    model, hf = family(name)
    prompts = made_up_prompts()
    check(ablate_layers(model, prompts, "resample", seed=3), slowly(hf, prompts, "resample", 3), 1e-4)


@pytest.mark.parametrize("ablation", ("mean", "zero"))
@pytest.mark.parametrize("name", ("gpt2", "neox-parallel"))
def test_other_ablations_equal_full_forward_passes(family, name, ablation):
    model, hf = family(name)
    prompts = made_up_prompts(((3, 12), (2, 9)))
    check(ablate_layers(model, prompts, ablation), slowly(hf, prompts, ablation, 0), 1e-4)


@pytest.mark.parametrize("name", ("gpt2", "neox-parallel", "neox-sequential", "opt"))
def test_float64_equals_the_reference_to_1e_9(family, name):
    model, hf = family(name, torch.float64)
    prompts = made_up_prompts(((3, 12), (2, 7)), seed=1)
    check(ablate_layers(model, prompts, "resample"), slowly(hf, prompts, "resample", 0), 1e-9)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_decomposition_is_exact(family, name, ablation):
    dtype = torch.float32 if name.startswith("llama") else torch.float64  # transformers' RMSNorm is float32 in any case
    model, _ = family(name, dtype)
    measured = ablate_layers(model, made_up_prompts(), ablation)
    rest = measured["total_effect"] - (measured["direct_effect"] - measured["compensation"] - measured["norm_term"])
    assert abs(rest).max() < (1e-10 if dtype == torch.float64 else 1e-4)
    assert all(float(abs(measured[name]).max()) > 0.1 for name in SCALARS)
    xr.testing.assert_allclose(measured["change"].sum("observed"), measured["compensation"], atol=1e-5)


def test_downstream_by_hand():
    sequential, parallel = hydra.downstream(2, False), hydra.downstream(2, True)
    assert sequential.astype(int).tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert parallel.astype(int).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_trained_model_equals_the_reference():
    model = load_model("pocket-pythia-small", device="cpu")
    hf = AutoModelForCausalLM.from_pretrained(MODELS / "pocket-pythia-small", dtype=torch.float64, attn_implementation="sdpa")
    prompts = made_up_prompts(((3, 10),), vocab=4096)
    check(ablate_layers(model, prompts, "resample"), slowly(hf, prompts, "resample", 0), 1e-4)


def test_chunks_do_not_matter(family, monkeypatch):
    model, _ = family("gpt2")
    prompts = made_up_prompts()
    whole = ablate_layers(model, prompts, "resample")
    monkeypatch.setattr(hydra, "TOKENS_AT_ONCE", 30)
    xr.testing.assert_allclose(ablate_layers(model, prompts, "resample"), whole, rtol=1e-4, atol=1e-5)


def test_refuses_what_it_cannot_measure(family):
    model, _ = family("gpt2")
    with pytest.raises(UserError, match="unknown ablation 'knockout'"):
        ablate_layers(model, made_up_prompts(), "knockout")


# ---------------------------------------------------------------- a model whose compensation is planted

SHARE = 0.4
WRITER = 4  # attention of layer 2
COMPENSATOR = {"attention": 6, "MLP": 7}  # of layer 3


def pair(k, d_model=20):
    vector = torch.zeros(d_model, dtype=torch.float64)
    vector[2 * k], vector[2 * k + 1] = 0.5**0.5, -(0.5**0.5)
    return vector


@pytest.fixture(scope="module", params=("attention", "MLP"))
def planted(request, tmp_path_factory):
    """Attention 2 writes the mean of the tokens' feature F so far along U; in layer 3 one part takes away ``SHARE`` of what lies along U.

    Other parts write nothing or a constant along U. Norms have so large an ε that they are linear, so that the final norm does nothing.
    """
    config = GPT2Config(
        vocab_size=8,
        n_positions=8,
        n_embd=20,
        n_layer=4,
        n_head=1,
        n_inner=2,
        activation_function="relu",
        layer_norm_epsilon=1e16,
        tie_word_embeddings=False,
    )
    hf = GPT2LMHeadModel(config).double()
    U, F = pair(8), pair(9)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.zero_()
        for name, parameter in hf.named_parameters():
            if "ln_" in name and name.endswith("weight"):
                parameter.fill_(1e8)
        base = hf.transformer
        base.wte.weight.copy_(torch.outer(torch.arange(1.0, 9.0), F))
        base.wpe.weight.copy_(torch.stack([pair(k) for k in range(8)]))
        hf.lm_head.weight[0] = U
        base.h[2].attn.c_attn.weight[:, 40:] = torch.eye(20)
        base.h[2].attn.c_proj.weight.copy_(torch.outer(F, U))
        base.h[0].mlp.c_proj.bias.copy_(0.3 * U)
        base.h[1].attn.c_proj.bias.copy_(0.2 * U)
        last = base.h[3]
        if request.param == "attention":
            positions = sum(torch.outer(pair(k), pair(k)) for k in range(8))
            last.attn.c_attn.weight[:, :20] = last.attn.c_attn.weight[:, 20:40] = 1e3 * positions  # every position sees itself alone
            last.attn.c_attn.weight[:, 40:] = torch.eye(20)
            last.attn.c_proj.weight.copy_(-SHARE * torch.outer(U, U))
        else:
            last.mlp.c_fc.weight.copy_(torch.stack([U, -U], dim=1))
            last.mlp.c_proj.weight.copy_(SHARE * torch.stack([-U, U]))
    folder = tmp_path_factory.mktemp("planted") / "planted"
    hf.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(MODELS / "pocket-gpt2").save_pretrained(folder)
    return request.param, load_model(str(folder), device="cpu", dtype=torch.float64)


def test_planted_compensation_is_found_and_nothing_else(planted):
    part, model = planted
    prompts = made_up_prompts(((6, 5), (4, 7)), vocab=8)
    measured = ablate_layers(model, prompts, "resample", seed=5).transpose("ablated", "observed", "prompt")
    written = np.array([np.mean(np.array(tokens) + 1.0) for tokens in prompts.tokens])
    centred = 7 / 8  # the logit of one of eight tokens when the others' are 0
    np.testing.assert_allclose(measured["clean_logit"], centred * (1 - SHARE) * (written + 0.5), atol=1e-9)
    assert (measured["token"] == 0).all()
    wanted_effect = np.zeros((8, len(written)))
    wanted_effect[[1, 2, WRITER, COMPENSATOR[part]]] = (
        np.full_like(written, 0.3),
        np.full_like(written, 0.2),
        written,
        -SHARE * (written + 0.5),
    )
    np.testing.assert_allclose(measured["effect"], centred * wanted_effect, atol=1e-9)
    lost = np.zeros_like(written)
    for number, members in enumerate(prompts.groups):
        pairs = draw_donors(prompts.answers[members], hydra.N_DONORS, 5 + number)
        for i, member in enumerate(members):
            lost[member] = centred * (written[member] - np.mean([written[members[j]] for k, j in pairs if k == i]))
    assert np.abs(lost).max() > 0.5
    np.testing.assert_allclose(measured["direct_effect"][WRITER], lost, atol=1e-9)
    np.testing.assert_allclose(measured["compensation"][WRITER], SHARE * lost, atol=1e-9)
    np.testing.assert_allclose(measured["total_effect"][WRITER], (1 - SHARE) * lost, atol=1e-9)
    np.testing.assert_allclose(measured["norm_term"], 0, atol=1e-9)
    change = measured["change"].values.copy()
    np.testing.assert_allclose(change[WRITER, COMPENSATOR[part]], SHARE * lost, atol=1e-9)
    change[WRITER, COMPENSATOR[part]] = 0
    np.testing.assert_allclose(change, 0, atol=1e-9)


def test_planted_compensation_in_what_the_notebook_says(planted):
    part, model = planted
    prompts = made_up_prompts(((12, 5),), vocab=8, seed=2)
    means = LayerMeans.of(ablate_layers(model, prompts, "resample"), n_bootstrap=50)
    found = hydra_statistics(means, without_dropout=True)
    written = np.mean([np.mean(np.array(tokens) + 1.0) for tokens in prompts.tokens])
    late = -SHARE * 7 / 8 * (written + 0.5) if part == "MLP" else 0
    wanted = {
        "compensation by downstream layers over direct effect, attention layers of the later half that have attention above": SHARE,
        "compensation by downstream layers over direct effect, trained without dropout": SHARE,
        "slope of compensation on direct effect over prompts, mean over attention layers of the later half that have attention above": SHARE,
        "share of downstream layers that change by more than a tenth of the direct effect, mean over attention layers": 1 / 3 / 4,
        "unembedding-based effect of MLPs in the last third of layers, mean": late,
        "change of late MLPs' effect over direct effect when the attention layer with the largest direct effect below them is ablated": SHARE
        * (part == "MLP"),
    }
    for statistic, value in wanted.items():
        assert found[statistic][0] == pytest.approx(value, abs=1e-9), statistic
    for samples in (found[statistic] for statistic in list(wanted)[:3]):
        np.testing.assert_allclose(samples[1:], SHARE, atol=1e-8)  # on every prompt alike
    assert means.coupling()[2, 0] == pytest.approx(1 / 3) and means.coupling(2 * SHARE)[2, 0] == 0
    assert means.strongest_below_late_mlps()[0] == WRITER


# ---------------------------------------------------------------- over prompts, by hand


def made_up_effects(n_layers=6, n_prompts=9, parallel=False, seed=0):
    rng = np.random.default_rng(seed)
    c = 2 * n_layers
    change = rng.normal(size=(c, n_prompts, c)) * hydra.downstream(n_layers, parallel)[:, None]
    data = {name: (("ablated", "prompt"), rng.normal(1, 1, size=(c, n_prompts))) for name in ("direct_effect", "total_effect", "norm_term")}
    data["compensation"] = (("ablated", "prompt"), change.sum(-1))
    data["change"] = (("ablated", "prompt", "observed"), change)
    data["effect"] = (("prompt", "observed"), rng.normal(size=(n_prompts, c)))
    return xr.Dataset(data, attrs={"model": "fake", "parallel": parallel})


def by_hand(effects, prompts, n_layers, parallel):
    """The claims' statistics from plain loops over the prompts (one may come twice)."""

    def values(name, component):
        return [float(effects[name].transpose(..., "prompt")[component, i]) for i in prompts]

    def changes(ablated, observed):
        return [float(effects["change"].transpose("ablated", "observed", "prompt")[ablated, observed, i]) for i in prompts]

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
            couplings.append(statistics.fmean(statistics.fmean(map(abs, changes(2 * layer, o))) > 0.1 * size for o in below))
    candidates = [2 * layer for layer in range(n_layers) if layer < late[0] // 2 + (not parallel)]
    strongest = max(candidates, key=lambda component: mean("direct_effect", component))
    given = sum(mean("compensation", a) for a in above) / sum(mean("direct_effect", a) for a in above)
    return [
        sum(mean("total_effect", 2 * layer) for layer in later) / sum(mean("effect", 2 * layer) for layer in later),
        given,
        statistics.fmean(float(np.polyfit(values("direct_effect", a), values("compensation", a), 1)[0]) for a in above),
        statistics.fmean(couplings),
        statistics.fmean(mean("effect", o) for o in late),
        sum(statistics.fmean(changes(strongest, o)) for o in late) / mean("direct_effect", strongest),
        given,
    ]


@pytest.mark.parametrize("parallel", (False, True))
def test_claims_by_hand(parallel):
    effects = made_up_effects(parallel=parallel)
    statistics_of = hydra_statistics(LayerMeans.of(effects, n_bootstrap=4, seed=7), without_dropout=True)
    names = [claim.statistic for claim in load_claims() if claim.notebook == "06"]
    assert set(statistics_of) == set(names) and len(names) == 7
    draws = [range(9), *([i for i, k in enumerate(w) for _ in range(int(k))] for w in bootstrap_weights(9, 4, 7))]
    for sample, prompts in enumerate(draws):
        wanted = by_hand(effects, prompts, 6, parallel)
        assert [statistics_of[name][sample] for name in names] == pytest.approx(wanted), sample
    assert set(names) - set(hydra_statistics(LayerMeans.of(effects, n_bootstrap=4), without_dropout=False)) == {names[-1]}


def test_few_layers_leave_statistics_out():
    found = hydra_statistics(LayerMeans.of(made_up_effects(n_layers=2), n_bootstrap=4), without_dropout=True)
    assert len(found) == 4 and all(np.isfinite(samples).all() for samples in found.values())


def test_means_of_some_prompts():
    effects = made_up_effects()
    some = np.arange(9) % 2 == 0
    part = LayerMeans.of(effects, some, n_bootstrap=3)
    assert part.n_prompts == 5
    assert part.effect[3, 0] == pytest.approx(statistics.fmean(float(effects["effect"][i, 3]) for i in (0, 2, 4, 6, 8)))
    table = part.by_layer().set_index(["part", "layer", "quantity"])["estimate"]
    assert table["MLP", 1, "effect"] == pytest.approx(part.effect[3, 0])
    assert table["attention", 4, "slope"] == pytest.approx(part.slope[8, 0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sizes", ([1], [1, 2, 3], [24]))
def test_models_of_any_depth_are_counted_and_drawn(sizes):
    """One parallel block, in which nothing is downstream of attention, up to more layers than labels fit."""
    runs = []
    for n in sizes:
        prompts = made_up_prompts(((9, 5),))
        effects = made_up_effects(n_layers=n, parallel=n == 1).assign_attrs(model=f"{n} layers")
        effects = effects.assign(clean_logit=("prompt", np.ones(9)))
        run = hydra.FactRun(f"{n} layers", prompts, effects, LayerMeans.of(effects, n_bootstrap=4))
        assert all(np.isfinite(samples).all() for samples in hydra_statistics(run.means, True).values())
        assert len(hydra_statistics(run.means, True)) == {1: 2, 2: 4, 3: 4, 24: 7}[n]
        assert run.by_phrasing()["prompts"].tolist() == [5, 4]
        hydra.worked_table(run, *hydra.worked_prompt(run))
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
    effects = made_up_effects()
    run = hydra.FactRun("fake", made_up_prompts(((9, 5),)), effects, LayerMeans.of(effects, n_bootstrap=4))
    lines = plots.effects_by_layer([run]).axes[1].containers
    np.testing.assert_allclose(lines[0][0].get_ydata(orig=False), run.means.effect[1::2, 0])
    np.testing.assert_allclose(lines[1][0].get_ydata(orig=False), run.means.total_effect[1::2, 0])
    image = plots.downstream_change([run]).axes[0].images[0].get_array()
    assert image[2, 5] == run.means.change[4, 5, 0] and np.ma.getmaskarray(np.ma.masked_invalid(image))[2, 4]
    clean, ablated = plots.late_mlps([run]).axes[0].containers
    strongest = run.means.strongest_below_late_mlps()[0]
    np.testing.assert_allclose(clean[0].get_ydata(orig=False), run.means.effect[1::2, 0])
    assert ablated[0].get_ydata(orig=False)[-1] == pytest.approx(run.means.effect[11, 0] + run.means.change[strongest, 11, 0])
    plt.close("all")


# ---------------------------------------------------------------- what the notebook calls


@pytest.fixture(scope="module")
def facts_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hydra")
    return hydra.FactRun.of("pocket-pythia-small", facts_for("pocket-pythia-small"), 12, "resample", folder, 0, "cpu"), folder


def test_read_from_disk_instead_of_measured_again(facts_run, monkeypatch):
    run, folder = facts_run
    monkeypatch.setattr(hydra, "ablate_layers", lambda *_: pytest.fail("measured again"))
    model = load_model("pocket-pythia-small", "cpu")
    xr.testing.assert_identical(layer_effects(model, run.prompts, "resample", folder), run.effects)
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        layer_effects(model, run.prompts, "resample", folder, seed=1)


def test_a_damaged_store_is_measured_again_and_has_a_manifest(facts_run, tmp_path):
    run, folder = facts_run
    shutil.copytree(folder, tmp_path / "hydra")
    (store,) = (tmp_path / "hydra").glob("*.zarr")
    noted = json.loads(manifest_of(store).read_text())
    assert noted["source"] == "pocket-pythia-small" and noted["prompts_sha256"] == run.prompts.sha256 and noted["seed"] == 0
    assert [finding.agrees for finding in verify(tmp_path)] == [True]
    (store / "effect" / "zarr.json").unlink()
    assert [finding.agrees for finding in verify(tmp_path)] == [False]
    np.testing.assert_array_equal(
        layer_effects(load_model("pocket-pythia-small", "cpu"), run.prompts, "resample", store.parent)["token"], run.effects["token"]
    )
    assert [finding.agrees for finding in verify(tmp_path)] == [True]


def test_run_of_known_facts(facts_run):
    run, _ = facts_run
    assert run.effects["answered"].all() and (run.effects["token"].values == run.prompts.answers).all()
    (row,) = hydra.prompts_table([run]).to_dict("records")
    assert (row["asked"], row["measured"]) == (36, len(run.prompts.facts)) and row["spread between donors"] > 0
    phrasings = run.by_phrasing().set_index("phrasing")
    assert phrasings["prompts"].sum() == len(run.prompts.facts) and set(phrasings.index) == {"held out", "trained"}
    weighted = (phrasings["compensation"] * phrasings["prompts"]).sum() / phrasings["prompts"].sum()
    assert weighted == pytest.approx(run.means.compensation[run.means.later_attention(), 0].sum())
    assert hydra.trained_without_dropout("pocket-pythia-small") and not hydra.trained_without_dropout("gpt2")


def test_worked_prompt_adds_up(facts_run):
    run, _ = facts_run
    component, prompt = hydra.worked_prompt(run)
    here = run.effects.isel(prompt=prompt)
    table = hydra.worked_table(run, component, prompt)
    assert table["clean"].sum() == pytest.approx(float(here["clean_logit"]))
    assert table["ablated"].sum() == pytest.approx(float(here["clean_logit"] - here["total_effect"][component]), abs=1e-4)
    assert list(table["part"][1:4]) == ["attention 0", "MLP 0", "attention 1"]
    compensation = run.effects["compensation"].values[component]
    assert sorted(compensation).index(float(here["compensation"][component])) == len(compensation) // 2
    assert component == 2 * max(range(3), key=lambda layer: run.means.direct_effect[2 * layer, 0])


def test_over_training(facts_run, tmp_path):
    _, folder = facts_run
    trained = tmp_path / "trained"
    shutil.copytree(MODELS / "pocket-pythia-small", trained)
    for step in ("000100", "000002"):
        shutil.copytree(MODELS / "pocket-pythia-small", trained / "checkpoints" / f"step-{step}", ignore=lambda *_: ["metrics.json"])
    weights = torch.nn.Module.state_dict(untrained := AutoModelForCausalLM.from_pretrained(trained))
    with torch.no_grad():
        for weight in weights.values():
            if weight.ndim > 1:
                weight.copy_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    untrained.save_pretrained(trained / "checkpoints" / "step-000002")
    assert [step for step, _ in hydra.checkpoints(str(trained))] == [2, 100, 2465]
    assert hydra.checkpoints("pocket-pythia-small") == [] == hydra.checkpoints("gpt2")
    table = hydra.over_training(str(trained), facts_for(str(trained)), 10, "resample", folder, 0, "cpu")
    estimate = table.pivot(index="step", columns="quantity", values="estimate")
    assert estimate.loc[100].equals(estimate.loc[2465])
    assert estimate.loc[2, "answered"] == 0 < 0.3 < estimate.loc[100, "answered"] <= 1
    assert abs(estimate.loc[2, "direct effect"]) < 0.05 < estimate.loc[100, "direct effect"]
    assert (table["low"] <= table["estimate"] + 1e-9).all() and (table["estimate"] <= table["high"] + 1e-9).all()
    assert json.loads((trained / "metrics.json").read_text())["steps"] == 2465
