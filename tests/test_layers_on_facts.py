"""Facts, layers and layers over training as a study measures them, on the smallest embedded model."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import AutoModelForCausalLM

from selfrepair.analysis.layers import (
    LayerRun,
    by_phrasing,
    over_training,
    prompts_table,
)
from selfrepair.analysis.worked_prompt import worked_prompt, worked_sums, worked_table
from selfrepair.measure import facts, layer_ablation, layers, layers_on_prose, layers_over_training
from selfrepair.models.checkpoints import checkpoints
from selfrepair.models.loading import load_model
from selfrepair.paths import MODELS
from selfrepair.run.study import Study
from selfrepair.run.verify import verify
from selfrepair.store.manifest import manifest_of
from selfrepair.text.facts import choose_prompts, facts_for

MODEL = "pocket-pythia-small"


def study(folder, **changes):
    return Study.of(**{"model": MODEL, "device": "cpu", "out_dir": folder, "n_facts": 12, **changes})


@pytest.fixture(scope="module")
def facts_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    here = study(folder)
    return LayerRun.of("facts", here.measured("layers")[MODEL]), here.measured("facts")[MODEL], folder


@pytest.mark.slow("layers are measured on the facts that a model answers")
def test_the_store_of_facts_gives_back_the_prompts_that_were_chosen(facts_run):
    _, asked, _ = facts_run
    prompts = choose_prompts(load_model(MODEL, "cpu"), facts_for(MODEL), 12)
    assert [len(members) for members in prompts.groups] == [
        len(group.prompts) for group in facts.prompt_groups(asked)
    ]
    for members, group in zip(prompts.groups, facts.prompt_groups(asked), strict=True):
        np.testing.assert_array_equal(group.prompts, members)
        assert group.tokens.tolist() == [prompts.tokens[i] for i in members]
    np.testing.assert_array_equal(asked["answer"], prompts.answers)
    for i, tokens in enumerate(prompts.tokens):
        padded = asked["token"].values[i].tolist()
        assert padded == tokens + [-1] * (len(padded) - len(tokens)) and asked["length"][i] == len(tokens)
    about = asked.attrs
    said = zip(about["texts"], about["answers"], about["relations"], about["phrasings"], strict=True)
    assert list(said) == [(fact.text, fact.answer, fact.relation, fact.phrasing) for fact in prompts.facts]
    counts = (about["n_asked"], about["n_answered"], about["n_alone"])
    assert counts == (prompts.n_asked, prompts.n_answered, prompts.n_alone)


def test_read_from_disk_instead_of_measured_again(facts_run, monkeypatch):
    run, _, folder = facts_run
    monkeypatch.setattr(layer_ablation, "ablate_layers", lambda *_: pytest.fail("measured again"))
    xr.testing.assert_identical(study(folder).measured("layers")[MODEL].load(), run.effects)
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        study(folder, seed=1).measured("layers")


@pytest.mark.slow("a damaged store of layers is measured again")
def test_a_damaged_store_is_measured_again_and_has_a_manifest(facts_run, tmp_path):
    """There is no manifest of a whole run here, and none is missed."""
    run, asked, folder = facts_run
    here = study(tmp_path)
    stores = [study(folder).task(name, MODEL).path for name in ("facts", "layers")]
    for store in stores:
        shutil.copytree(store, tmp_path / "measured" / store.name)
        shutil.copy(manifest_of(store), tmp_path / "measured")
    noted = json.loads(manifest_of(stores[1]).read_text())
    assert noted["source"] == MODEL and noted["seed"] == 0 and noted["trained_without_dropout"] is True
    assert noted["inputs_sha256"] == {"facts": asked.attrs["sha256"]}
    assert all(finding.agrees for finding in verify(tmp_path, "cpu"))
    (tmp_path / "measured" / stores[1].name / "effect" / "zarr.json").unlink()
    found = {finding.what: finding.agrees for finding in verify(tmp_path, "cpu")}
    assert (found[stores[0].name], found[stores[1].name]) == (True, False)
    np.testing.assert_array_equal(here.measured("layers")[MODEL]["token"], run.effects["token"])
    assert all(finding.agrees for finding in verify(tmp_path, "cpu"))


def test_a_store_is_merged_of_its_shards(facts_run):
    run, asked, _ = facts_run
    settings = {"ablation": "resample", "layer_positions": "last", "seed": 0}
    whole = layer_ablation.ablate_on_facts(load_model(MODEL, "cpu"), asked, settings, {})
    assert run.effects["made_in_shard"].values.tolist() == [0, 1] * (len(whole["ablated"]) // 2)
    for name, values in whole.variables.items():
        np.testing.assert_allclose(run.effects[name], values, rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(run.effects["prompt"], asked["prompt"])


def test_run_of_known_facts(facts_run):
    run, asked, _ = facts_run
    assert run.effects["answered"].all() and (run.effects["token"].values == asked["answer"].values).all()
    (row,) = prompts_table([run], {MODEL: asked}).to_dict("records")
    assert (row["asked"], row["prompts"]) == (36, asked.sizes["prompt"])
    spread = run.effects["total_effect_spread"].sel(ablated=[0, 2, 4, 6])
    assert row["spread between donors"] == pytest.approx(float(spread.mean())) and spread.min() > 0
    total = run.effects["total_effect"].sel(ablated=[0, 2, 4, 6])
    assert row["size of the effect"] == pytest.approx(float(abs(total).mean()))
    phrasings = by_phrasing(run, asked).set_index("phrasing")
    assert phrasings["prompts"].sum() == asked.sizes["prompt"]
    assert set(phrasings.index) == {"held out", "trained"}
    weighted = (phrasings["compensation"] * phrasings["prompts"]).sum() / phrasings["prompts"].sum()
    assert weighted == pytest.approx(run.means.compensation.value[run.means.later_attention()].sum())


@pytest.mark.parametrize(("name", "known"), [(MODEL, True), ("pocket-gpt2-dropout", False), ("gpt2", False)])
def test_trained_without_dropout(name, known):
    for measurement in (layers.MEASUREMENT, layers_on_prose.MEASUREMENT):
        assert measurement.fingerprint({"model_name": name}) == {"trained_without_dropout": known}


def test_worked_prompt_adds_up(facts_run):
    run, asked, _ = facts_run
    worked = worked_prompt(run, asked)
    here, component = run.effects.isel(prompt=worked.prompt), worked.component
    table = worked_table(run, worked)
    assert table["clean"].sum() == pytest.approx(float(here["clean_logit"]))
    ablated_logit = float(here["clean_logit"] - here["total_effect"][component])
    assert table["ablated"].sum() == pytest.approx(ablated_logit, abs=1e-4)
    assert list(table["part"][1:4]) == ["attention 0", "MLP 0", "attention 1"]
    (sums,) = worked_sums(table, component).to_dict("records")
    assert sums["logit"] == pytest.approx(-float(here["total_effect"][component]), abs=1e-4)
    assert sums["parts above"] == pytest.approx(float(here["compensation"][component]), abs=1e-4)
    assert sums["ablated part"] == pytest.approx(-float(here["direct_effect"][component]))
    compensation = run.effects["compensation"].values[component]
    assert sorted(compensation).index(float(here["compensation"][component])) == len(compensation) // 2
    assert component == 2 * max(range(3), key=lambda layer: run.means.direct_effect.value[2 * layer])
    assert (worked.text, worked.answer) == tuple(
        asked.attrs[what][worked.prompt] for what in ("texts", "answers")
    )


@pytest.mark.slow("layers are measured on prose and at all positions")
def test_on_prose_and_at_all_positions(facts_run, tmp_path):
    run, asked, folder = facts_run
    here = study(tmp_path, n_prompts=4)
    prose = here.measured("layers_on_prose")[MODEL]
    assert prose["prompt"].values.tolist() == list(range(4)) and (prose["n_donors"] == 3).all()
    everywhere = replace(here, profile=here.profile.changed(layer_positions="all"), out_dir=folder)
    effects = everywhere.measured("layers")[MODEL]
    assert effects.attrs["layer_positions"] == "all" and run.effects.attrs["layer_positions"] == "last"
    assert effects["n_donors"].max() <= 4
    xr.testing.assert_allclose(effects["effect"], run.effects["effect"], atol=1e-4)
    assert abs(effects["total_effect"] - run.effects["total_effect"]).max() > 0.1
    table = prompts_table([run, LayerRun.of("prose", prose, 5)], {MODEL: asked})
    row, other = table.to_dict("records")
    assert (row["condition"], other["condition"]) == ("facts", "prose")
    assert (other["asked"], other["donors"]) == ("", 3)


@pytest.fixture
def trained(tmp_path):
    """The model with two checkpoints: of step 2 with random weights, of step 100 as it is."""
    folder = tmp_path / "trained"
    shutil.copytree(MODELS / MODEL, folder)
    for step in ("000100", "000002"):
        shutil.copytree(
            MODELS / MODEL, folder / "checkpoints" / f"step-{step}", ignore=lambda *_: ["metrics.json"]
        )
    untrained = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in untrained.state_dict().values():
            if weight.ndim > 1:
                weight.copy_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    untrained.save_pretrained(folder / "checkpoints" / "step-000002")
    return folder


@pytest.mark.slow("layers are measured at every checkpoint of training, on the same prompts")
def test_over_training(trained, tmp_path):
    assert [saved.step for saved in checkpoints(str(trained))] == [2, 100, 2465]
    assert json.loads((trained / "metrics.json").read_text())["steps"] == 2465
    assert checkpoints(MODEL) == [] == checkpoints("gpt2")
    assert not layers_over_training.MEASUREMENT.applies_to({"model_name": MODEL})
    here = study(tmp_path / "out", model=str(trained), n_facts=10)
    (effects,) = here.measured("layers_over_training").values()
    assert effects["step"].values.tolist() == effects["made_in_shard"].values.tolist() == [2, 100, 2465]
    table = over_training(effects)
    assert set(table["model"]) == {"trained"} and set(table["prompts"]) == {effects.sizes["prompt"]}
    estimate = table.pivot(index="step", columns="quantity", values="estimate")
    assert estimate.loc[100].equals(estimate.loc[2465])
    assert estimate.loc[2, "answered"] == 0 < 0.3 < estimate.loc[100, "answered"] <= 1
    assert abs(estimate.loc[2, "direct effect"]) < 0.05 < estimate.loc[100, "direct effect"]
    assert (table["low"] <= table["estimate"] + 1e-9).all() and (
        table["estimate"] <= table["high"] + 1e-9
    ).all()


def test_other_checkpoints_are_another_store(trained, tmp_path):
    here = study(tmp_path / "out", model=str(trained))
    names = [here.task("layers_over_training", str(trained)).path]
    config = trained / "checkpoints" / "step-000100" / "config.json"
    config.write_text(config.read_text() + "\n")
    names.append(here.task("layers_over_training", str(trained)).path)
    metrics = json.loads((trained / "metrics.json").read_text())
    for change in ({"steps": 2466}, {"config": {**metrics["config"], "gazetteer_seed": 5}}):
        (trained / "metrics.json").write_text(json.dumps({**metrics, **change}))
        names.append(here.task("layers_over_training", str(trained)).path)
    assert len(set(names)) == 4
    shutil.rmtree(trained / "checkpoints")
    assert not layers_over_training.MEASUREMENT.applies_to({"model_name": str(trained)})
