"""Blocks run at one position of prompts, against blocks run over whole prompts."""

import families
import pytest
import torch
from families import ALL_FAMILIES, LENGTH, load_family, random_tokens
from transformers import DynamicCache

from selfrepair.engine import one_position
from selfrepair.engine.forward import Replay, run_clean, z_reached
from selfrepair.engine.one_position import CleanKeys, OnePosition

POSITIONS = (0, LENGTH // 2, LENGTH - 1)
#: Rows of which prompt: not in order, not equally many.
PROMPT = torch.tensor([2, 0, 2, 1, 0])


class Changed:
    """Rows whose residual stream before a layer differs from the clean run's at one position."""

    def __init__(self, model, position, seed=0):
        tokens = random_tokens(3)
        generator = torch.Generator().manual_seed(seed)
        self.model, self.position = model, position
        cache = DynamicCache()
        self.clean, self.replay = run_clean(model, tokens, cache=cache), Replay(model, LENGTH)
        self.at = OnePosition(CleanKeys.of(model, tokens, cache), position)
        self.change = torch.randn(len(PROMPT), 32, generator=generator)

    def whole(self, layer):
        residual = self.clean.residuals[layer][PROMPT].clone()
        residual[:, self.position] += self.change
        return residual

    def here(self, layer):
        return self.whole(layer)[:, self.position : self.position + 1]


def same(found, wanted):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_a_block_gives_what_it_gives_in_the_whole_prompt(family, path, name, position):
    rows = Changed(path(family(name)[0]), position)
    moved = []
    for layer in range(rows.model.n_layers):
        wanted = rows.replay.block(layer, rows.whole(layer))[:, [position]]
        same(rows.at.rows_of(PROMPT).block(layer, rows.here(layer)), wanted)
        untouched = rows.replay.block(layer, rows.clean.residuals[layer][PROMPT])[:, [position]]
        moved.append(((wanted - untouched - rows.change[:, None]).abs().amax((1, 2)) > 0.1).all())
    assert all(moved)  # what is added is not merely passed on


@torch.no_grad()
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_all_blocks_above_give_what_a_whole_pass_gives(family, name, position):
    rows = Changed(family(name)[0], position, seed=1)
    whole, here, replay = rows.whole(1), rows.here(1), rows.at.rows_of(PROMPT)
    for layer in range(1, rows.model.n_layers):
        whole, here = rows.replay.block(layer, whole), replay.block(layer, here)
    same(here, whole[:, [position]])


@torch.no_grad()
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_given_attention_and_z_reached_are_those_of_the_whole_prompt(family, path, name):
    rows = Changed(path(family(name)[0]), 5)
    given = torch.randn(len(PROMPT), LENGTH, 32, generator=torch.Generator().manual_seed(2))
    wanted = rows.replay.block_given_attention(1, rows.whole(1), given)
    found = rows.at.rows_of(PROMPT).block_given_attention(1, rows.here(1), given[:, [5]])
    same(found, wanted[:, [5]])
    wanted = z_reached(rows.model, 2, lambda: rows.replay.block(2, rows.whole(2)))
    found = z_reached(rows.model, 2, lambda: rows.at.rows_of(PROMPT).block(2, rows.here(2)))
    same(found, wanted[:, [5]])


@torch.no_grad()
def test_what_a_sliding_window_hides_stays_hidden(tmp_path, monkeypatch):
    model_type, settings = families.TINY["mistral"]
    monkeypatch.setitem(families.TINY, "mistral", (model_type, {**settings, "sliding_window": 4}))
    model = load_family("mistral", tmp_path)
    rows = Changed(model, 9)
    same(rows.at.rows_of(PROMPT).block(2, rows.here(2)), rows.replay.block(2, rows.whole(2))[:, [9]])
    far = rows.whole(2)
    far[:, :6] += 1
    same(rows.replay.block(2, far)[:, [9]], rows.replay.block(2, rows.whole(2))[:, [9]])  # it does hide


@torch.no_grad()
def test_rows_at_once_make_no_difference_and_bound_keys_and_values(family, monkeypatch):
    rows = Changed(family("llama-gqa")[0], 7)
    whole = rows.at.rows_of(PROMPT).block(1, rows.here(1))
    parts = zip(PROMPT.split(2), rows.here(1).split(2), strict=True)
    same(torch.cat([rows.at.rows_of(of).block(1, part) for of, part in parts]), whole)
    keys = rows.at.clean.keys[0]
    one_row = 2 * keys.shape[1] * 8 * keys.shape[3] * 4  # keys and values of positions 0 to 7, in float32
    assert rows.at.rows_at_once() == one_position.ROWS_BYTES // one_row
    monkeypatch.setattr(one_position, "ROWS_BYTES", 3 * one_row)
    assert rows.at.rows_at_once() == 3
    monkeypatch.setattr(one_position, "ROWS_BYTES", 1)
    assert rows.at.rows_at_once() == 1
