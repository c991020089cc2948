"""Notebook 05's quantities against slow references: plain Hugging Face models in float64, one hook and one full pass at a time."""

import csv

import matplotlib
import numpy as np
import pytest
import reference
import torch
from families import ALL_FAMILIES, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import _out_matrix, _parts
from transformers import GPT2Config, GPT2LMHeadModel

from selfrepair.analysis import iterative
from selfrepair.analysis.claims import load_claims
from selfrepair.text.corpora import Prompts
from selfrepair.errors import UserError
from selfrepair.analysis.iterative import SCALES, VECTORS, Alignment, EarlierInput, HeadCosines, SelfFeeding
from selfrepair.models.loading import load_model
from selfrepair.paths import PUBLISHED
from selfrepair.plots import iterative as plots
from selfrepair.engine.forward import Replay

matplotlib.use("agg")
HEADS = 4


def prompts(n=6, length=12, seed=0):
    return Prompts(random_tokens(n, length, seed).numpy(), "random tokens")


def tokens_of(found):
    return torch.from_numpy(found.tokens)


@torch.no_grad()
def z_with_input(hf, tokens, layer, change):
    """z of ``layer`` in a full pass in which ``change(residual)`` replaces the residual stream before that layer."""
    blocks, projections, _ = _parts(hf)
    seen = []

    def enter(_, args, kwargs):
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    handles = [
        blocks[layer].register_forward_pre_hook(enter, with_kwargs=True),
        projections[layer].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())),
    ]
    try:
        hf(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0]


def written(hf, z, layer, head):
    """What a head writes, its value bias moved out."""
    width = z.shape[-1] // HEADS
    part = slice(head * width, (head + 1) * width)
    return (z[..., part] - reference.value_bias(hf, layer)[part]) @ _out_matrix(_parts(hf)[1][layer])[part]


@torch.no_grad()
def effect(hf, clean, tokens, z, layer, head):
    sigma = reference.sigma(hf, clean["residual"][len(_parts(hf)[0])])
    return reference.read_frozen(hf, written(hf, z, layer, head), sigma, tokens)


def close(found, wanted, tolerance=1e-4):
    wanted = wanted.numpy() if isinstance(wanted, torch.Tensor) else wanted
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def equal(found, wanted, tolerance=1e-4):
    return np.abs(found - wanted.numpy()).max() <= tolerance * wanted.abs().max()


# Self-feeding


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_self_feeding_equals_full_passes(family, name, monkeypatch):
    model, hf = family(name)
    drawn = {}
    real = iterative._random_like

    def spy(output, seed, indices):
        drawn[tuple(seed[1:])] = real(output, seed, indices)
        return drawn[tuple(seed[1:])]

    monkeypatch.setattr(iterative, "_random_like", spy)
    here = prompts()
    tokens = tokens_of(here)
    fed = iterative.self_feeding(model, here, seed=7)
    with torch.no_grad():
        clean = reference.forward(hf, tokens)
        outputs = {(layer, head): written(hf, clean["z"][layer], layer, head) for layer in range(3) for head in range(HEADS)}
        means = {key: effect(hf, clean, tokens, clean["z"][key[0]], *key).mean().item() for key in outputs}
        order = sorted(means, key=means.get, reverse=True)
        assert fed.heads == sorted({*order[:5], *(key for key in outputs if key[0] == 2)})
        assert fed.ranks == [order.index(head) + 1 for head in fed.heads]
        for i in (0, len(fed.heads) // 2, len(fed.heads) - 1):
            layer, head = fed.heads[i]

            def after(vector, scale, layer=layer, head=head):
                z = z_with_input(hf, tokens, layer, lambda residual: residual + scale * vector)
                return effect(hf, clean, tokens, z, layer, head)

            close(fed.before[i], effect(hf, clean, tokens, clean["z"][layer], layer, head))
            for s, scale in enumerate(SCALES):
                close(fed.after[i, 0, s], after(outputs[layer, head], scale))
                close(fed.after[i, 2, s], after(drawn[layer, head].double(), scale))
            others = [key for key in outputs if key != (layer, head)]
            fitting = [key for key in others if equal(fed.after[i, 1, -1], after(outputs[key], SCALES[-1]))]
            assert len(fitting) == 1
            close(fed.after[i, 1, 0], after(outputs[fitting[0]], SCALES[0]))
            random = drawn[layer, head].double()
            torch.testing.assert_close(random.norm(dim=-1), outputs[layer, head].norm(dim=-1), rtol=1e-4, atol=1e-6)
            assert torch.cosine_similarity(random, outputs[layer, head], dim=-1).abs().mean() < 0.4
    first, second = (drawn[head] for head in fed.heads[:2])
    for other in (second, first.roll(1, 0), first.roll(1, 1)):  # another head, prompt, position: another direction
        assert torch.cosine_similarity(first, other, dim=-1).abs().mean() < 0.4


def test_self_feeding_does_not_depend_on_batches_but_on_the_seed(family, monkeypatch):
    model, _ = family("opt")
    here = prompts(4, 8)
    wanted = iterative.self_feeding(model, here, seed=1)
    monkeypatch.setattr(iterative, "pairs_that_fit", lambda *_: 1)
    monkeypatch.setattr(iterative, "rows_that_fit", lambda *_: 3)
    found = iterative.self_feeding(model, here, seed=1)
    np.testing.assert_allclose(found.after, wanted.after, rtol=1e-4, atol=1e-5)
    other = iterative.self_feeding(model, here, seed=2)
    np.testing.assert_allclose(other.after[:, 0], wanted.after[:, 0], rtol=1e-4, atol=1e-5)
    assert all(np.abs(other.after[:, 2, s] - wanted.after[:, 2, s]).mean() > 1e-2 for s in range(len(SCALES)))


def test_random_head_is_another_one_and_every_other_one_can_be_drawn():
    heads = [(layer, head) for layer in range(2) for head in range(3)]
    drawn = {iterative._another_head((1, 1), heads, seed) for seed in range(100)}
    assert drawn == set(heads) - {(1, 1)}


def test_only_the_first_prompts_are_fed(family, monkeypatch):
    model, _ = family("gpt2")
    monkeypatch.setattr(iterative, "SELF_FEEDING_PROMPTS", 2)
    assert iterative.self_feeding(model, prompts(6)).before.shape[1] == 2


def test_what_comes_after_the_attention_does_not_run(family):
    model, _ = family("neox-sequential")
    replay = Replay(model, 12)
    ran = []
    handles = [module.register_forward_hook(lambda *_: ran.append(1)) for module in (*model.mlp_output_projections, *model.blocks)]
    residual = torch.randn(2, 12, 32)
    z = iterative.attention_z(model, replay, 1, residual)
    for handle in handles:
        handle.remove()
    assert z.shape == (2, 12, 4, 8) and not ran
    assert not any(projection._forward_pre_hooks for projection in model.output_projections)
    with pytest.raises(RuntimeError, match="layer 2 did not run"):
        iterative.z_reached(model, 2, lambda: None)
    replay.block(1, residual)  # still runs whole


def feeding(slope_by_head, n_layers=4, n_prompts=6, noise=0.0):
    """Heads whose after is slope · before + 0.3, with (layer, head): (own, random head, random direction) at the largest scale."""
    rng = np.random.default_rng(0)
    before = rng.normal(size=(len(slope_by_head), n_prompts, 5))
    slope = np.ones((len(slope_by_head), 3, len(SCALES)))
    slope[:, :, -1] = list(slope_by_head.values())
    after = (
        slope[..., None, None] * before[:, None, None] + 0.3 + noise * rng.normal(size=(len(slope_by_head), 3, len(SCALES), n_prompts, 5))
    )
    return SelfFeeding(n_layers, list(slope_by_head), list(range(1, len(slope_by_head) + 1)), before, after)


@settings(max_examples=25, deadline=None)
@given(slope=st.floats(-3, 3), seed=st.integers(0, 99), n_prompts=st.integers(2, 9))
def test_a_straight_line_has_its_slope_in_every_sample(slope, seed, n_prompts):
    found = iterative.slopes(feeding({(0, 0): (slope, 1, 0)}, n_prompts=n_prompts), 20, seed)
    assert found.shape == (1, 3, 5, 21)
    np.testing.assert_allclose(found[0, 0, -1], slope, atol=1e-9)
    np.testing.assert_allclose(found[0, 1], 1, atol=1e-9)
    np.testing.assert_allclose(found[0, 2, -1], 0, atol=1e-9)


def test_slopes_are_least_squares_over_the_prompts_drawn():
    fed = feeding({(0, 0): (2, 1, 1), (3, 1): (0.5, 1, 0)}, noise=1.0)
    found = iterative.slopes(fed, 30, seed=4)
    drawn = np.random.Generator(np.random.PCG64(4)).multinomial(6, np.full(6, 1 / 6), size=30)
    for sample, times in enumerate([np.ones(6, dtype=int), *drawn]):
        index = np.repeat(np.arange(6), times)
        for i, v, s in ((0, 0, 4), (1, 2, 1)):
            wanted = np.polyfit(fed.before[i, index].ravel(), fed.after[i, v, s][index].ravel(), 1)[0]
            assert abs(found[i, v, s, sample] - wanted) < 1e-9


def test_table_has_the_published_columns_and_intervals():
    fed = feeding({(2, 1): (1.5, 1, 0.9), (3, 0): (0.2, 1, 1)}, noise=0.5)
    table = iterative.self_feeding_table("some", fed)
    published = iterative.published_self_feeding()
    assert list(table.columns) == [*published.columns, "slope_low", "slope_high"]
    assert set(published["added_vector"]) == set(VECTORS) and set(published["scale"]) == set(SCALES)
    assert len(table) == 2 * 3 * 5
    row = table.set_index(["layer", "head", "added_vector", "scale"]).loc[(3, 0, "own_output", 8)]
    after = fed.after[1, 0, -1]
    assert row["n_tokens"] == 30 and row["rank_by_mean_direct_effect"] == 2
    assert row["mean_direct_effect_before"] == pytest.approx(fed.before[1].mean())
    assert row["mean_direct_effect_after"] == pytest.approx(after.mean())
    assert row["median_before"] == pytest.approx(np.median(fed.before[1])) and row["median_after"] == pytest.approx(np.median(after))
    samples = iterative.slopes(fed)[1, 0, -1]
    assert row["slope_after_on_before"] == pytest.approx(np.polyfit(fed.before[1].ravel(), after.ravel(), 1)[0])
    assert [row["slope_low"], row["slope_high"]] == pytest.approx(list(np.quantile(samples[1:], [0.025, 0.975])))


# One layer earlier


def top(values, fraction):
    """A mask of the ceil(fraction · n) largest values."""
    kept = sorted(values.flatten().tolist(), reverse=True)[: -(-int(fraction * values.numel() * 1000) // 1000)]
    return values >= kept[-1]


@pytest.mark.parametrize(
    ("name", "ablation"), [*((name, "resample") for name in ALL_FAMILIES), ("gpt2", "mean"), ("neox-parallel", "zero")]
)
def test_one_layer_earlier_equals_full_passes(family, name, ablation):
    model, hf = family(name)
    here = prompts()
    tokens = tokens_of(here)
    found = iterative.one_layer_earlier(model, here, ablation, 0.25)
    clean = reference.forward(hf, tokens)
    for layer in (1, 2):
        effects = [effect(hf, clean, tokens, clean["z"][layer - 1], layer - 1, head) for head in range(HEADS)]
        strongest = max(range(HEADS), key=lambda head: effects[head][top(effects[head], 0.25)].mean().item())
        chosen = top(effects[strongest], 0.25)
        assert found.ablated_heads[layer - 1] == strongest
        np.testing.assert_array_equal(found.counts[layer - 1], chosen.sum(1).numpy())
        d_head = clean["z"][layer - 1].shape[-1] // HEADS
        part = slice(strongest * d_head, (strongest + 1) * d_head)
        z = clean["z"][layer - 1][..., part]
        new = {"resample": z[[3, 4, 5, 0, 1, 2]], "mean": z.mean((0, 1)).expand_as(z)}.get(ablation)
        if ablation == "zero":
            new = reference.value_bias(hf, layer - 1)[part].expand_as(z)
        without = reference.forward(hf, tokens, (layer - 1, strongest, new))["z"][layer]
        earlier = z_with_input(hf, tokens, layer, lambda _, layer=layer: clean["residual"][layer - 1])
        for sums, changed in ((found.earlier, earlier), (found.ablated, without)):
            wanted = [
                (
                    (effect(hf, clean, tokens, changed, layer, head) - effect(hf, clean, tokens, clean["z"][layer], layer, head)) * chosen
                ).sum(1)
                for head in range(HEADS)
            ]
            close(sums[layer - 1], torch.stack(wanted))


def test_one_layer_earlier_does_not_depend_on_batches(family, monkeypatch):
    model, _ = family("llama-gqa")
    wanted = iterative.one_layer_earlier(model, prompts(), "resample", 0.1)
    monkeypatch.setattr(iterative, "pairs_that_fit", lambda *_: 1)
    found = iterative.one_layer_earlier(model, prompts(), "resample", 0.1)
    np.testing.assert_allclose(found.ablated, wanted.ablated, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.earlier, wanted.earlier, rtol=1e-4, atol=1e-5)


def test_bad_requests(family, tmp_path):
    model, _ = family("gpt2")
    with pytest.raises(UserError, match="unknown ablation 'noise'"):
        iterative.one_layer_earlier(model, prompts(), "noise", 0.1)
    with pytest.raises(UserError, match="fraction"):
        iterative.one_layer_earlier(model, prompts(), "zero", 0.0)
    single = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_layer=1, n_head=4, n_embd=32, n_positions=32))
    single.save_pretrained(tmp_path / "single")
    model.tokenizer.save_pretrained(tmp_path / "single")
    with pytest.raises(UserError, match="one layer"):
        iterative.one_layer_earlier(load_model(str(tmp_path / "single"), device="cpu"), prompts(), "zero", 0.1)


def test_mean_changes_and_their_correlation():
    rng = np.random.default_rng(1)
    counts = np.array([[2.0, 0, 4], [1, 1, 4]])
    earlier, ablated = rng.normal(size=(2, 2, 4, 3))
    found = EarlierInput([0, 1], earlier, ablated, counts)
    x, y = iterative.mean_changes(found, 50, seed=3)
    np.testing.assert_allclose(x[..., 0], earlier.sum(-1) / 6)
    drawn = np.random.Generator(np.random.PCG64(3)).multinomial(3, np.full(3, 1 / 3), size=50)
    r = iterative.correlation(x, y)
    assert (drawn[:, 1] == 3).any()
    for sample, times in enumerate([np.ones(3), *drawn]):
        totals = (counts * times).sum(-1)
        if (totals == 0).any():
            assert np.isnan(r[sample])
            continue
        a, b = ((values * times).sum(-1) / totals[:, None] for values in (earlier, ablated))
        np.testing.assert_allclose(y[..., sample], b)
        assert r[sample] == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1])


# Outputs of heads


@torch.no_grad()
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_cosines_of_head_outputs(family, name, monkeypatch):
    model, hf = family(name)
    here = prompts(4, 9)
    monkeypatch.setattr(iterative, "COSINE_BYTES", 4 * 12 * 32 * 3)  # three positions at once
    found = iterative.head_cosines(model, here)
    clean = reference.forward(hf, tokens_of(here))
    outputs = [written(hf, clean["z"][layer], layer, head)[:, :-1] for layer in range(3) for head in range(HEADS)]
    cosine = torch.stack([torch.stack([torch.cosine_similarity(a, b, dim=-1).mean(1) for b in outputs]) for a in outputs])
    close(found.heads, cosine.mean(-1), 1e-5)
    for a in range(3):
        for b in range(3):
            pairs = [(i, j) for i in range(4 * a, 4 * a + 4) for j in range(4 * b, 4 * b + 4) if i != j]
            close(found.layers[a, b], torch.stack([cosine[pair] for pair in pairs]).mean(0), 1e-4)


def test_cosine_by_distance_and_neighbours():
    layers = np.zeros((5, 5, 2))
    for a in range(5):
        for b in range(5):
            layers[a, b] = [10.0 ** -abs(a - b), 0]
    layers[0, 3] = layers[3, 0] = [0.5, 0]
    cosines = HeadCosines(np.eye(10), layers)
    found = iterative.cosine_by_distance(cosines, 10)
    np.testing.assert_allclose(found[:, 0], np.array([1, 0.1, 0.01, (0.5 + 0.001) / 2, 0.0001]) / 2)
    assert iterative.neighbours_minus_distant(cosines, 10)[0] == pytest.approx((0.1 - (0.5 + 0.001 + 0.0001) / 3) / 2)


# Updates and gradients


def loss_of(hf, tokens):
    logits = hf(input_ids=tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
    return -logits.gather(-1, tokens[:, 1:, None]).sum()


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_gradients_equal_central_differences(family, name):
    model, hf = family(name, torch.float64)
    reference.in_float64(model.hf)
    tokens = random_tokens(2, 7)
    _, gradients = iterative.residual_gradients(model, Replay(model, 7), tokens)
    blocks = _parts(hf)[0]
    generator = torch.Generator().manual_seed(5)
    step = 1e-5
    for layer in range(3):
        for position in (0, 3, 5):
            nudge = torch.zeros(2, 7, 32, dtype=torch.float64)
            nudge[1, position] = torch.randn(32, generator=generator, dtype=torch.float64)

            def moved(by, layer=layer, nudge=nudge):
                def enter(_, args, kwargs):
                    if args:
                        return (args[0] + by * nudge, *args[1:]), kwargs
                    return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + by * nudge}

                handle = blocks[layer].register_forward_pre_hook(enter, with_kwargs=True)
                with torch.no_grad():
                    loss = loss_of(hf, tokens)
                handle.remove()
                return loss

            wanted = (moved(step) - moved(-step)) / (2 * step)
            assert wanted.abs() > 1e-3
            assert abs((gradients[layer] * nudge).sum() - wanted) < 1e-6 * max(1, wanted.abs())


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_alignment_equals_autograd_through_the_plain_model(family, name, monkeypatch):
    model, hf = family(name)
    here = prompts(6, 10)
    tokens = tokens_of(here)
    wanted_grad = [parameter.requires_grad for parameter in model.hf.parameters()]
    found = iterative.alignment(model, here)
    assert [parameter.requires_grad for parameter in model.hf.parameters()] == wanted_grad
    assert all(parameter.grad is None for parameter in model.hf.parameters())
    blocks, _, norm = _parts(hf)
    residuals = []

    def keep(residual):
        residual.retain_grad()
        residuals.append(residual)

    handles = [b.register_forward_pre_hook(lambda _, a, k: keep(a[0] if a else k["hidden_states"]), with_kwargs=True) for b in blocks]
    handles.append(norm.register_forward_pre_hook(lambda _, args: keep(args[0])))
    loss_of(hf, tokens).backward()
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        for layer in range(3):
            update, final = (residuals[layer + 1] - residuals[layer])[:, :-1], residuals[3][:, :-1]
            down = -residuals[layer].grad[:, :-1]
            cosine = (update * down).sum(-1) / (update.norm(dim=-1) * down.norm(dim=-1))
            close(found.gradient[layer], cosine.mean(1))
            close(found.final[layer], ((update * final).sum(-1) / (update.norm(dim=-1) * final.norm(dim=-1))).mean(1))
        for layer in range(4):
            logits = hf.get_output_embeddings()(norm(residuals[layer]))[:, :-1]
            close(found.loss[layer], -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0].mean(1))
    monkeypatch.setattr(iterative, "GRADIENT_BYTES", 1)
    one_by_one = iterative.alignment(model, here)
    np.testing.assert_allclose(one_by_one.gradient, found.gradient, atol=1e-5)
    np.testing.assert_allclose(one_by_one.loss, found.loss, rtol=1e-5)


# Claims


def some_cosines(n_layers, n_prompts=6):
    layers = np.random.default_rng(2).normal(size=(n_layers, n_layers, n_prompts))
    return HeadCosines(np.eye(2 * n_layers), layers + layers.swapaxes(0, 1))


def some_alignment(n_layers, n_prompts=6):
    rng = np.random.default_rng(3)
    return Alignment(*(rng.normal(size=(n, n_prompts)) for n in (n_layers, n_layers)), rng.uniform(2, 9, size=(n_layers + 1, n_prompts)))


def test_statistics_are_those_of_the_claims_and_of_the_later_half():
    fed = feeding({(0, 0): (5, 1, 9), (1, 1): (-5, 1, 9), (2, 0): (1.3, 1, 0.9), (3, 0): (0.6, 1, 1.0), (3, 1): (0.4, 1, 0.5)})
    aligned = some_alignment(4)
    found = iterative.iterative_statistics(fed, some_cosines(4), aligned, 25)
    assert set(found) == {claim.statistic for claim in load_claims() if claim.notebook == "05"}
    assert all(samples.shape == (26,) for samples in found.values())
    np.testing.assert_allclose(found["largest slope of direct effect after on before, own output, largest scale"], 1.3)
    np.testing.assert_allclose(found["smallest slope of direct effect after on before, own output, largest scale"], 0.4)
    np.testing.assert_allclose(found["mean slope of direct effect after on before, random direction, largest scale"], 0.8)
    gradient = found["mean cosine of block updates with the negative gradient of the loss"]
    assert gradient[0] == pytest.approx(aligned.gradient.mean())
    fed = feeding({(1, 0): (5, 1, 1), (2, 1): (2, 1, 1)}, n_layers=3)
    assert not any("neighbouring" in name for name in iterative.iterative_statistics(fed, some_cosines(3), some_alignment(3), 5))


def test_largest_slope_is_sought_anew_in_every_sample():
    fed = feeding({(2, 0): (1.0, 1, 1), (3, 0): (1.0, 1, 1)}, noise=1.0)
    found = iterative.iterative_statistics(fed, some_cosines(4), some_alignment(4), 40)
    own = iterative.slopes(fed, 40)[:, 0, -1]
    largest = found["largest slope of direct effect after on before, own output, largest scale"]
    np.testing.assert_allclose(largest, np.maximum(*own))
    assert len({int(i) for i in own.argmax(0)}) == 2


def test_published_statistics_come_from_the_released_table():
    with (PUBLISHED / "published_self_feeding_heads.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["scale"] == "8"]
    found = iterative.published_statistics()
    assert list(found) == list(dict.fromkeys(row["model"] for row in rows))
    for model, statistics in found.items():

        def slope(vector, model=model):
            return [float(r["slope_after_on_before"]) for r in rows if (r["model"], r["added_vector"]) == (model, vector)]

        largest, smallest, direction = (
            statistics[f"{which} slope of direct effect after on before, {what}, largest scale"]
            for which, what in (("largest", "own output"), ("smallest", "own output"), ("mean", "random direction"))
        )
        assert largest.shape == smallest.shape == direction.shape == (1,)
        assert largest[0] == max(slope("own_output")) and smallest[0] == min(slope("own_output"))
        assert direction[0] == pytest.approx(sum(slope("random_direction")) / 4)
    name = "largest slope of direct effect after on before, own output, largest scale"
    assert found["gpt2-large"][name][0] == pytest.approx(1.78146)


# Figures: what is plotted


def test_slopes_are_plotted_where_they_are():
    fed = feeding({(2, 0): (1.3, 1, 0.9), (3, 0): (0.6, 1, 1.0), (3, 1): (0.4, 1, 0.5)}, noise=0.3)
    table = iterative.self_feeding_table("some", fed)
    figure = plots.slope_by_head(table, iterative.published_self_feeding())
    assert [axis.get_title() for axis in figure.axes] == ["measured\nsome", "published\n5 models"]
    own, _, direction = (line for line in figure.axes[0].lines if line.get_marker() == "o")
    found = iterative.slopes(fed, 1)[:, :, -1, 0]
    np.testing.assert_allclose(own.get_ydata(), sorted(found[:, 0]))
    np.testing.assert_allclose(direction.get_ydata(), found[np.argsort(found[:, 0]), 2])
    figure = plots.slope_by_scale(table, iterative.published_self_feeding())
    assert len(figure.axes) == 6
    lines = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_ydata()) == len(SCALES)]
    assert len(lines) == 9
    assert any(np.allclose(line, iterative.slopes(fed, 1)[0, 0, :, 0]) for line in lines)


def test_other_figures_hold_their_numbers():
    fed = feeding({(2, 0): (1.3, 1, 0.9), (3, 0): (0.6, 1, 1.0)})
    figure = plots.effect_after_against_before({"some": fed})
    np.testing.assert_allclose(
        figure.axes[0].collections[0].get_offsets(), np.column_stack([fed.before[0].ravel(), fed.after[0, 0, -1].ravel()])
    )
    assert figure.axes[1].get_title() == "some L3H0\nsmallest slope: 0.60"
    aligned = some_alignment(4)
    figure = plots.alignment_by_layer({"a": aligned, "b": some_alignment(3)})
    for axis, values in zip(figure.axes, (aligned.gradient, aligned.final, aligned.loss), strict=True):
        np.testing.assert_allclose(axis.lines[0].get_ydata(), values.mean(1))
    cosines = some_cosines(4)
    assert np.array_equal(plots.cosine_matrices({"a": cosines}).axes[0].images[0].get_array(), cosines.heads)
    line = plots.cosines_by_distance({"a": cosines}).axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), iterative.cosine_by_distance(cosines, 1)[:, 0])
    rng = np.random.default_rng(0)
    changes = EarlierInput([1], rng.normal(size=(1, 3, 6)), rng.normal(size=(1, 3, 6)), np.full((1, 6), 2.0))
    axis = plots.earlier_against_ablated({"a": changes}).axes[0]
    points = next(line for line in axis.lines if line.get_marker() == "o")
    np.testing.assert_allclose(points.get_xydata(), np.column_stack([changes.ablated.sum(-1)[0], changes.earlier.sum(-1)[0]]) / 12)
