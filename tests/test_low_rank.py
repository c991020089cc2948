"""The first maps after an ablation, from a change of rank d_head, against the maps and the reference."""

import contextlib
import dataclasses

import pytest
import reference
import torch
from families import FAMILIES, random_tokens

from selfrepair.engine.ablations import find_ablation
from selfrepair.engine.fast import fast_path, low_rank
from selfrepair.engine.fast.low_rank import FirstMaps
from selfrepair.engine.forward import run_clean
from selfrepair.engine.head_ablation import HeadAblations, ablate_heads
from selfrepair.engine.sites import HEADS

FIELDS = [field.name for field in dataclasses.fields(HeadAblations)]


@pytest.fixture
def fast(family):
    """``fast(name, dtype)`` is the model by the fast path."""
    with contextlib.ExitStack() as until_the_end:
        yield lambda *which: until_the_end.enter_context(fast_path(family(*which)[0], on=True))


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(low_rank, "PAYS_ON_CPU_FROM_D_MODEL", 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_reference(family, fast, name, always, monkeypatch):
    model, hf = fast(name), family(name)[1]
    tokens = random_tokens()
    used = []
    real = FirstMaps.given
    monkeypatch.setattr(FirstMaps, "given", lambda self, *them: used.append(self) or real(self, *them))
    found = ablate_heads(model, tokens, find_ablation("resample").prepare(model, [], HEADS))
    assert len(set(map(id, used))) == model.n_layers - model.parallel
    for layer in range(model.n_layers):
        for head in (0, 2):
            wanted = reference.ablate(hf, tokens, layer, head, "resample")
            scale = wanted["logit_change"].abs().max()
            for field in FIELDS:
                got = getattr(found, field)
                got = got if field == "sigma_clean" else got[layer, head]
                assert (got - wanted[field]).abs().max() <= 1e-4 * max(scale, wanted[field].abs().max()), (
                    layer,
                    head,
                    field,
                )


@pytest.mark.parametrize("name", ("gpt2", "neox-parallel", "neox-sequential", "opt"))
def test_equals_the_whole_maps_in_float64(fast, name, monkeypatch):
    model = fast(name, torch.float64)
    tokens = random_tokens()
    here = find_ablation("zero").prepare(model, [], HEADS)
    whole = ablate_heads(model, tokens, here, rows=12)
    monkeypatch.setattr(low_rank, "PAYS_ON_CPU_FROM_D_MODEL", 0)
    found = ablate_heads(model, tokens, here, rows=12)
    for field in FIELDS:
        torch.testing.assert_close(getattr(found, field), getattr(whole, field), rtol=0, atol=1e-10)


def test_large_products_are_not_made(fast, always, monkeypatch):
    """Inside, the MLP's input map sees no row of width d_model but the residual that the norm hands on."""
    model = fast("gpt2")
    tokens = random_tokens()
    clean = run_clean(model, tokens)
    maps = FirstMaps(model, clean, 1)
    widths = []
    real = low_rank.linear_map
    monkeypatch.setattr(
        low_rank,
        "linear_map",
        lambda x, weight, *bias: widths.append((x.shape, weight.shape)) or real(x, weight, *bias),
    )
    (_, (linear,)) = model.first_maps[1][1]
    before = linear.forward
    with torch.no_grad(), maps.given(torch.randn(*tokens.shape, 1, 8), 2):
        model.blocks[1].mlp(model.first_maps[1][1][0](clean.residuals[1]))
    assert [x[-1] for x, _ in widths if x[0] == len(tokens)] == [8]
    assert linear.forward is before  # the module has its own again


def test_pays_only_where_measured(family):
    model, _ = family("gpt2")
    assert model.W_U.shape[1] < low_rank.PAYS_ON_CPU_FROM_D_MODEL and not FirstMaps.pay(model, 0)


def test_the_plain_path_runs_the_maps_themselves(family, always):
    model, _ = family("gpt2")
    assert FirstMaps.pay(model, 0) and FirstMaps.of(model, run_clean(model, random_tokens()), 0) is None
