"""What a step, the start of a phase and an epoch of training do, and what is said of the rows held out."""

import csv
import dataclasses

import numpy as np
import pytest
import torch
from test_training import BATCH, CPU, TINY, config_of_rows, phases

from selfrepair.paths import HELD_OUT_TEXT
from selfrepair.training import loop
from selfrepair.training.architecture import build_model
from selfrepair.training.config import Phase
from selfrepair.training.data import prepare
from selfrepair.training.evaluate import token_loss
from selfrepair.training.loop import build_optimizers, lr_factor, train

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def data(own_cache):
    return prepare(TINY, HELD_OUT_TEXT)


def test_a_step_clips_and_has_the_rate_of_each_optimizer():
    """Muon for matrices, which decay; AdamW for the rest, which does not."""
    config = dataclasses.replace(TINY, clip=1e-3)
    torch.manual_seed(0)
    model = build_model(config, 0)
    optimizers = build_optimizers(model, config)
    loop._step(model, optimizers, torch.randint(config.vocab_size, (2, 16)), config, 0)
    length = sum(float(one.grad.double().square().sum()) for one in model.parameters()) ** 0.5
    assert length == pytest.approx(1e-3, rel=1e-2)
    rates = [one.param_groups[0]["lr"] for one in optimizers]
    wanted = [rate * lr_factor(config, 0) for rate in (config.lr_matrices, config.lr_other)]
    assert [type(one).__name__ for one in optimizers] == ["Muon", "AdamW"]
    assert rates == pytest.approx(wanted) and config.lr_matrices != config.lr_other
    assert [one.param_groups[0]["weight_decay"] for one in optimizers] == [config.weight_decay, 0]
    assert config.weight_decay > 0


def test_a_phase_begins_from_what_would_be_stored_with_a_seed_of_its_own():
    model = build_model(TINY, 0)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    loop._begin_phase(model, dataclasses.replace(TINY, seed=3), 20)
    assert torch.initial_seed() == 23
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name].half().float()), name
    assert any(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_the_validation_loss_is_that_of_rows_held_out(tmp_path, data):
    config = dataclasses.replace(TINY, phases=phases(3))
    model = train(config, data, tmp_path, CPU)
    *_, last = csv.DictReader((tmp_path / "curve.csv").open())
    held_out, trained_on = (
        token_loss(model, torch.from_numpy(rows[:128].astype(np.int64)))
        for rows in (data.validation, data.corpus)
    )
    assert float(last["validation_loss"]) == pytest.approx(held_out, abs=1e-3)
    assert abs(held_out - trained_on) > 0.01


def test_every_phase_has_an_order_and_paragraphs_of_its_own(data):
    rows = data.training_rows(config_of_rows(Phase(BATCH * 30, 0.5), Phase(BATCH * 30, 0.5)))
    corpus = {row.tobytes() for row in data.corpus}
    first, second = ([row.tobytes() for row in part] for part in (rows[:120], rows[120:]))
    places = [[row in corpus for row in part] for part in (first, second)]
    assert sum(places[0]) == sum(places[1]) == 60 and places[0] != places[1]
    assert not (set(first) & set(second)) - corpus


def test_every_epoch_has_an_order_of_its_own(data):
    n = 50
    few = dataclasses.replace(data, corpus=data.corpus[:n])
    rows = [row.tobytes() for row in few._corpus_rows(0, 4 * n, seed=0)]
    orders = [rows[n * epoch : n * (epoch + 1)] for epoch in range(4)]
    assert orders[0] == [row.tobytes() for row in few.corpus]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert [row.tobytes() for row in few._corpus_rows(130, 40, seed=0)] == rows[130:170]


def test_a_digest_knows_the_rows_held_out(data):
    rows = data.training_rows(TINY)
    other = dataclasses.replace(data, validation=data.validation[::-1])
    assert data.digest(rows) == data.digest(rows.copy()) != other.digest(rows)
