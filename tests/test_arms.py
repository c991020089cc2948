"""Arms: models trained alike but for dropout and seed; their table, and what notebook 08 says of it."""

import dataclasses
import itertools
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import yaml
from fake_sweeps import FRACTION, HEADS, LAYERS, fake_sweep, tokens_of
from filelock import FileLock
from matplotlib.collections import PathCollection
from test_layer_means import made_up_effects

from selfrepair.analysis import arms as analysis
from selfrepair.analysis.estimates import Estimate
from selfrepair.cli.main import main
from selfrepair.errors import UserError
from selfrepair.models.loading import load_hf, load_model
from selfrepair.paths import HELD_OUT_TEXT, MODELS, PROFILES
from selfrepair.plots import arms as plots
from selfrepair.run import arms as running
from selfrepair.run.arms import load_arms, run_arms
from selfrepair.run.study import Study
from selfrepair.store import code_identity
from selfrepair.store.stores import write_store
from selfrepair.training.evaluate import evaluate

CONFIG = {
    "architecture": "gpt2", "n_layers": 4, "n_heads": 2, "d_model": 16, "d_mlp": 32, "vocab_size": 512,
    "batch_size": 4, "precision": "float32", "phases": [{"tokens": 4 * 128 * 3, "gazetteer_share": 0.25}],
}  # fmt: skip
TWO = {"trained": [{"group": "tiny, a", "config": CONFIG, "vary": {"head_dropout": [0.0, 0.5], "seed": [3]}}]}


def write(folder, values):
    file = folder / "arms.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


# ------------------------------------------------------------------------------------------------ the file


def test_all_combinations_of_what_varies_are_arms(tmp_path):
    vary = {"head_dropout": [0.0, 0.25], "seed": [1, 2, 3]}
    arms = load_arms(write(tmp_path, {"trained": [{"group": "g", "config": CONFIG, "vary": vary}]}))
    found = {(arm.config.head_dropout, arm.config.seed) for arm in arms}
    assert found == {(p, s) for p in (0.0, 0.25) for s in (1, 2, 3)}
    assert len({arm.name for arm in arms}) == 6
    assert all(arm.config.name == arm.name and arm.group == "g" for arm in arms)


def test_checkpoints_of_a_model_are_arms_in_order(tmp_path):
    arms = load_arms(write(tmp_path, {"given": [{"group": "g", "checkpoints_of": "pocket-pythia"}]}))
    steps = [arm.step for arm in arms]
    assert steps == sorted(steps) and steps[0] == 0 and len(steps) == 8
    assert arms[-1].model_name == "pocket-pythia"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"trainde": []}, "unknown key 'trainde'; known are trained, given"),
        ({"trained": [{"group": "g", "config": CONFIG}]}, "must have the keys group, config, vary"),
        ({"trained": ["g"]}, "must have the keys group, config, vary"),
        ({"trained": [{"group": "g", "config": {}, "vary": {"seed": [1]}}]}, "missing architecture"),
        (
            {"trained": [{"group": "g", "config": CONFIG, "vary": {"head_dropout": [1.5]}}]},
            "head_dropout must lie in [0, 1)",
        ),
        ({"given": [{"group": "g", "models": ["a/b", "a/b"]}]}, "two arms are called 'a/b'"),
        ({"given": "pocket-gpt2"}, "given must be a list of groups"),
        ({"given": [{"group": "g", "models": "pocket-gpt2"}]}, "models must be a list of names"),
        ({"given": [{"group": "g", "checkpoints_of": 3}]}, "checkpoints_of must be the name of a model"),
        ({"given": [{"group": 3, "models": []}]}, "group must be a name"),
        ({"trained": [{"group": "g", "config": 3, "vary": {}}]}, "config must be 'key: value' lines"),
        ({"trained": [{"group": "g", "config": CONFIG, "vary": {"seed": 1}}]}, "vary must give a list"),
        ({"trained": [{"group": "g", "config": CONFIG, "vary": [1]}]}, "vary must give a list"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, values, says):
    with pytest.raises(UserError) as error:
        load_arms(write(tmp_path, values))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_arms_must_be_trained_on_a_text(tmp_path, capsys):
    assert main(["arms", str(write(tmp_path, TWO)), "--out", str(tmp_path / "out")]) == 1
    assert "must be trained first; give the folder of its text with --text" in capsys.readouterr().err


def test_a_missing_model_is_said_before_anything_is_made(tmp_path):
    file = write(tmp_path, TWO | {"given": [{"group": "g", "models": [str(tmp_path / "none")]}]})
    with pytest.raises(UserError, match="no such folder"):
        run_arms(file, HELD_OUT_TEXT, tmp_path / "out", "cpu")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- the command


@pytest.mark.slow(
    "models are trained and measured, and their table written, by one command that can be killed"
)
def test_the_command_trains_measures_and_goes_on(tmp_path, own_cache, monkeypatch):
    file, out = write(tmp_path, TWO), tmp_path / "out"
    trained = []
    train = running.train

    def watched(config, *arguments):
        trained.append(config.name)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(config, *arguments)

    monkeypatch.setattr(running, "train", watched)
    with pytest.raises(KeyboardInterrupt):
        run_arms(file, HELD_OUT_TEXT, out, "cpu")
    assert not (tmp_path / "arms.csv").exists()
    first, second = (arm.name for arm in load_arms(file))
    with FileLock(out / "rows" / f"{second}.lock"):  # another process makes the second
        assert run_arms(file, HELD_OUT_TEXT, out, "cpu") is None
    assert run_arms(file, HELD_OUT_TEXT, out, "cpu") == tmp_path / "arms.csv"
    assert trained == [first, second, second]
    table = pd.read_csv(tmp_path / "arms.csv")
    assert list(table["name"]) == [first, second] and list(table["head_dropout"]) == [0.0, 0.5]
    assert (table["tokens"] == 4 * 128 * 3).all() and (table["seed"] == 3).all()
    assert np.isfinite(table[[*analysis.SHARES, "compensation-prose"]].to_numpy()).all()
    assert table["compensation-facts"].isna().all()  # it answers none
    # What the row says is what the ordinary measurement of the folder gives.
    arms = analysis.read_arms(tmp_path)
    model = load_model(str(out / "trained" / second), torch.device("cpu"))
    assert model.weights_sha256.startswith(table["weights_sha256"][1])
    assert arms["weights_sha256"].values[1] == table["weights_sha256"][1]
    metrics = json.loads((out / "trained" / second / "metrics.json").read_text())
    assert metrics["config"]["head_dropout"] == 0.5
    can_do = evaluate(*load_hf(str(out / "trained" / second), torch.device("cpu")), gazetteer_seed=0)
    assert can_do["loss_held_out_prose"] == pytest.approx(table["loss_held_out_prose"][1], abs=1e-5)
    # Nothing is made again, unless the configuration changes.
    assert run_arms(file, None, out, "cpu") and len(trained) == 3
    changed = CONFIG | {"lr_other": 0.001}
    write(tmp_path, {"trained": [TWO["trained"][0] | {"config": changed}]})
    with pytest.raises(UserError, match="must be trained again: its model is of another configuration"):
        run_arms(file, None, out, "cpu")


class Made:
    """Names of the models that were measured and trained, in order; what is measured is made up."""

    def __init__(self, monkeypatch):
        self.measured, self.trained = [], []
        effects = {name: Estimate(np.zeros(3)) for name in analysis.QUANTITIES}
        can_do = {"loss_held_out_prose": 5.0, "fact_recall_held_out_phrasings": 0.0}
        train = running.train

        def measured(study, name):
            if name == "heads":
                self.measured.append(study.profile.models[0].split("/")[-1])
            return {"model": xr.Dataset(attrs={"weights_sha256": "0123"})}

        def trained(config, *arguments):
            self.trained.append(config.name)
            return train(config, *arguments)

        monkeypatch.setattr(Study, "measured", measured)
        monkeypatch.setattr(running, "effects_of_arm", lambda *_: effects)
        monkeypatch.setattr(running, "evaluate", lambda *_, **__: can_do)
        monkeypatch.setattr(running, "train", trained)


@pytest.fixture
def made(monkeypatch, own_cache):
    return Made(monkeypatch)


def edit_code(name, monkeypatch, _folder):
    content = code_identity._content

    def of_an_edited_one(file, *state):
        return content(file, *state) + (b"# edited" if file.as_posix().endswith(name) else b"")

    monkeypatch.setattr(code_identity, "_content", of_an_edited_one)


def edit_profile(name, monkeypatch, folder):
    settings = yaml.safe_load((PROFILES / "pocket.yaml").read_text())
    (folder / "other.yaml").write_text(yaml.safe_dump(settings | {name: settings[name] / 2}))
    monkeypatch.setattr(running, "PROFILE", str(folder / "other.yaml"))


def edit_held_out_text(name, monkeypatch, folder):
    shutil.copytree(HELD_OUT_TEXT, folder / "text")
    with (folder / "text" / name).open("a") as file:
        file.write("And one more sentence.\n")
    monkeypatch.setattr("selfrepair.measure.tokens.HELD_OUT_TEXT", folder / "text")


def edit_model(name, _monkeypatch, folder):
    file = folder / "mine" / name
    file.write_text(file.read_text().replace("\n", "\n ", 1))


@pytest.mark.parametrize(
    ("edit", "name", "is_made_again"),
    [
        (edit_code, "analysis/arms.py", True),
        (edit_code, "engine/head_ablation.py", True),
        (edit_code, "measure/layers_on_prose.py", True),
        (edit_code, "training/evaluate.py", True),
        (edit_profile, "fraction", True),
        (edit_held_out_text, "nature.txt", True),
        (edit_model, "config.json", True),
        (edit_code, "plots/arms.py", False),
        (edit_code, "run/page.py", False),
    ],
)
def test_a_row_is_made_again_when_what_it_was_made_of_changes(
    tmp_path, made, monkeypatch, edit, name, is_made_again
):
    shutil.copytree(MODELS / "pocket-pythia-small", tmp_path / "mine")
    file = write(tmp_path, {"given": [{"group": "g", "models": [str(tmp_path / "mine")]}]})
    for _ in range(2):
        assert run_arms(file, None, tmp_path / "out", "cpu") == tmp_path / "arms.csv"
    assert made.measured == ["mine"]
    edit(name, monkeypatch, tmp_path)
    run_arms(file, None, tmp_path / "out", "cpu")
    assert made.measured == ["mine"] * (1 + is_made_again)


def test_a_model_is_trained_again_for_another_text_or_by_other_code(tmp_path, made, monkeypatch):
    """And then measured again; without a text, the one that it was trained on is good."""
    file = write(tmp_path, {"trained": [TWO["trained"][0] | {"vary": {"seed": [3]}}]})
    (arm,), out = load_arms(file), tmp_path / "out"
    texts = [HELD_OUT_TEXT / name for name in ("nature.txt", "stories.txt")]
    for text in (texts[0], None, texts[0]):
        run_arms(file, text, out, "cpu")
        assert made.trained == made.measured == [arm.name]
    run_arms(file, texts[1], out, "cpu")
    assert made.trained == made.measured == [arm.name] * 2
    edit_code("training/head_dropout.py", monkeypatch, tmp_path)
    with pytest.raises(
        UserError, match="again: its model is of another version of the code; give the folder"
    ):
        run_arms(file, None, out, "cpu")
    run_arms(file, texts[1], out, "cpu")
    assert made.trained == [arm.name] * 3


def make_a_row(arm, row):
    about = {name: kind("" if kind is str else 0) for name, kind in _kinds().items()}
    effects = {name: Estimate(np.zeros(3)) for name in analysis.QUANTITIES}
    write_store(
        [analysis.arms_dataset([(about | {"name": arm.name, "group": arm.group}, effects)])], row, "arm"
    )


TWO_GIVEN = {"given": [{"group": "g", "models": ["pocket-gpt2", "pocket-pythia"]}]}


def test_of_two_processes_that_pass_over_each_others_arms_the_last_writes_the_table(
    tmp_path, monkeypatch, capsys
):
    """One makes the first arm until the other makes the second, which ends last."""
    file, out = write(tmp_path, TWO_GIVEN), tmp_path / "out"
    makes_first, makes_second = threading.Event(), threading.Event()

    def make(arm, _text, _folder, _device, row):
        if row.exists():
            return
        make_a_row(arm, row)
        if arm.name == "pocket-gpt2":
            makes_first.set()
            assert makes_second.wait(60)
        else:
            makes_second.set()
            assert early.result(60) is None

    monkeypatch.setattr(running, "_make", make)
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(run_arms, file, None, out, "cpu")
        assert makes_first.wait(60)
        assert run_arms(file, None, out, "cpu") == tmp_path / "arms.csv"
    assert capsys.readouterr().err == "being made by another process: pocket-pythia\n"
    assert list(pd.read_csv(tmp_path / "arms.csv")["name"]) == ["pocket-gpt2", "pocket-pythia"]


def test_two_processes_write_the_table_one_after_the_other(tmp_path, monkeypatch):
    file, out = write(tmp_path, TWO_GIVEN), tmp_path / "out"
    for arm in load_arms(file):
        make_a_row(arm, out / "rows" / f"{arm.file_name}.zarr")
    writing, at_once = [], []

    def write_slowly(*_):
        writing.append("now")
        at_once.append(len(writing))
        time.sleep(0.5)
        writing.pop()
        return file

    def run(_):
        while run_arms(file, None, out, "cpu") is None:  # the other looked at an arm just then
            pass

    monkeypatch.setattr(running, "_make", lambda *_: None)
    monkeypatch.setattr(running, "_write_table", write_slowly)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    assert at_once == [1, 1]


def test_nothing_is_written_beside_a_model_of_ones_own(tmp_path, made):
    models, out = tmp_path / "models", tmp_path / "out"
    shutil.copytree(MODELS / "pocket-pythia-small", models / "mine")
    (models / "mine.zarr").mkdir()
    (models / "mine.zarr" / "thesis.txt").write_text("years of work")
    before = set(models.rglob("*"))
    file = write(tmp_path, {"given": [{"group": "g", "models": [str(models / "mine")]}]})
    run_arms(file, None, out, "cpu")
    assert set(models.rglob("*")) == before
    assert (out / "rows" / "mine.zarr").is_dir()
    assert list(pd.read_csv(tmp_path / "arms.csv")["name"]) == ["mine"]


def test_models_of_one_name_are_refused(tmp_path):
    folders = [str(tmp_path / place / "mine") for place in "ab"]
    for folder in folders:
        shutil.copytree(MODELS / "pocket-pythia-small", folder)
    with pytest.raises(UserError, match="two arms are called 'mine'; their groups, or folders, need other"):
        load_arms(write(tmp_path, {"given": [{"group": "g", "models": folders}]}))


# ------------------------------------------------------------------------------------------------- analysis


def test_shares_are_ratios_of_sums_over_heads():
    sweep = fake_sweep()
    sweep["direct_effect"] = abs(sweep["direct_effect"])
    found = analysis.PartMeans.of_sweep(sweep, FRACTION, 0)
    effect, given = 0.0, dict.fromkeys(("heads", "mlps", "layernorm"), 0.0)
    for layer in range(LAYERS):
        for head in range(HEADS):
            tokens = tokens_of(sweep, layer, head)
            effect += sum(token["direct_effect"] for token in tokens) / len(tokens)
            for part in given:
                given[part] += sum(token[part] for token in tokens) / len(tokens)
    for parts in analysis.SHARES.values():
        expected = sum(given[part] for part in parts) / effect
        assert found.restored(parts).value == pytest.approx(expected, rel=1e-6)


def some_arms(values, **known):
    """Arms with these values of every quantity, ``[arm, draw]``, and what is known of them."""
    rows = []
    for number, drawn in enumerate(values):
        about = {name: kind("" if kind is str else 0) for name, kind in _kinds().items()}
        about |= {"name": f"arm-{number}"} | {name: of_arms[number] for name, of_arms in known.items()}
        rows.append((about, {name: Estimate(np.array(drawn, dtype=float)) for name in analysis.QUANTITIES}))
    return analysis.arms_dataset(rows)


def _kinds():
    return {name: str if kind is object else kind for name, kind in analysis.KNOWN.items()}


def test_an_arm_is_compared_with_the_control_of_its_own_seed():
    """By hand: seeds 1 and 2, in another order, gain 0.3 and 0.1; seed 9 has no control."""
    arms = some_arms(
        [[value] * 41 for value in (0.5, 0.1, 0.4, 0.6, 7.0)],
        seed=[2, 1, 1, 2, 9], head_dropout=[0.0, 0.0, 0.5, 0.5, 0.5],
    )  # fmt: skip
    treated, control = analysis.where(arms, head_dropout=0.5), analysis.where(arms, head_dropout=0.0)
    gain = analysis.against_control(treated, control, "non-norm")
    assert gain.value == pytest.approx(0.2)
    assert set(np.round(gain.samples, 6)) == {0.1, 0.2, 0.3}


def test_samples_of_a_gain_draw_seeds():
    rng = np.random.default_rng(0)
    seeds = list(range(1, 6))
    base = rng.normal(size=(5, 401)) * 0.01
    gains = np.array([0.0, 0.1, 0.2, 0.3, 0.4])
    arms = some_arms(
        np.concatenate([base, base + gains[:, None]]), seed=seeds * 2, head_dropout=[0.0] * 5 + [0.5] * 5
    )
    treated, control = analysis.where(arms, head_dropout=0.5), analysis.where(arms, head_dropout=0.0)
    low, high = analysis.against_control(treated, control, "heads").interval()
    # Of five gains, a mean's standard error is √2 · 0.1 / √5; noise that both arms share goes out.
    assert low == pytest.approx(0.2 - 1.96 * 0.0632, abs=0.03)
    assert high == pytest.approx(0.2 + 1.96 * 0.0632, abs=0.03)


def test_a_dose_curve_has_the_means_over_seeds():
    arms = some_arms([[0.0], [0.2], [1.0]], seed=[1, 2, 1], head_dropout=[0.0, 0.0, 0.5])
    curve = analysis.dose_curve(arms, "head_dropout")
    rows = curve[curve["quantity"] == "mlps"].set_index("dose")
    assert rows["estimate"].to_dict() == pytest.approx({0.0: 0.1, 0.5: 1.0})
    assert rows["n_arms"].to_dict() == {0.0: 2, 0.5: 1}


def test_effects_of_an_arm_by_loops():
    sweep = fake_sweep()
    sweep["direct_effect"] = abs(sweep["direct_effect"])
    layers = {"layers": made_up_effects(seed=1), "layers_on_prose": made_up_effects(seed=2)}
    found = analysis.effects_of_arm(sweep, layers, FRACTION)
    tokens = [tokens_of(sweep, layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    effect = sum(np.mean([token["direct_effect"] for token in of_head]) for of_head in tokens)
    wanted = {
        name: sum(np.mean([token[part] for token in of_head]) for of_head in tokens for part in parts)
        / effect
        for name, parts in analysis.SHARES.items()
    }
    for name, measurement in (("compensation-facts", "layers"), ("compensation-prose", "layers_on_prose")):
        given, direct = (
            sum(layers[measurement][quantity].values[component].mean() for component in (6, 8))
            for quantity in ("compensation", "direct_effect")
        )
        wanted[name] = given / direct
    assert {name: estimate.value for name, estimate in found.items()} == pytest.approx(wanted)


def test_what_is_measured_now_stands_beside_the_arm_as_shipped():
    """Not beside another of its name; models that are not shipped are left out."""
    drawn = [[0.1] * 3, [0.5] * 3, [0.4, 0.2, 0.6]]
    arms = some_arms(drawn, name=["a", "b", "a"], group=["other", "other", analysis.SHIPPED])
    now = {"a": {"heads": Estimate.bare(0.9)}, "b": {"heads": Estimate.bare(0.8)}}
    (row,) = analysis.compared(now, arms).to_dict("records")
    assert (row.pop("model"), row.pop("quantity")) == ("a", "heads")
    assert row == pytest.approx({"now": 0.9, "table": 0.4, "low": 0.21, "high": 0.59})


def test_arms_of_a_curve_are_those_of_its_dose_and_those_without_any_dropout():
    """One dropped in whole layers is neither; each stands in the curve once."""
    arms = some_arms(
        [[value, value - 1, value + 1] for value in (0.0, 0.2, 5.0, 1.0, 7.0)],
        name=list("abcde"), group=["g"] * 5, seed=[1, 2, 1, 1, 2],
        head_dropout=[0, 0, 0, 0.5, 0.5], attention_dropout_layer=[0, 0, 0.5, 0, 0],
    )  # fmt: skip
    curve = analysis.Curve("g")
    assert curve.untreated(arms)["name"].values.tolist() == ["a", "b"]
    assert curve.arms(arms)["name"].values.tolist() == ["a", "b", "d", "e"]
    curves = {"x": analysis.dose_curve(curve.arms(arms), "head_dropout")}
    assert analysis.at_dose(curves, "mlps").loc["x"].to_dict() == pytest.approx({0.0: 0.1, 0.5: 4.0})
    assert analysis.mean_of(arms, "g", "mlps")[0.5] == pytest.approx(4.0)


def test_curves_are_compared_at_one_dose_by_seed():
    """By hand: seeds 1 and 2 differ by 1 and 3; other doses and seeds do not matter."""
    layers, heads = (analysis.CURVES[name].group for name in ("gpt2, layers dropped", "gpt2, fine-tuned"))
    arms = some_arms(
        [[value] * 41 for value in (5.0, 6.0, 9.0, 4.0, 3.0, 7.0, 8.0)],
        group=[layers] * 3 + [heads] * 4, seed=[1, 2, 1, 1, 2, 3, 1],
        attention_dropout_layer=[0.5, 0.5, 0.25, 0, 0, 0, 0],
        head_dropout=[0, 0, 0, 0.5, 0.5, 0.5, 0.0],
    )  # fmt: skip
    names = ("gpt2, layers dropped", "gpt2, fine-tuned")
    found = analysis.between_curves(arms, *names, 0.5, "compensation-prose")
    assert found.value == pytest.approx(2.0) and set(found.samples) == {1.0, 2.0, 3.0}


def test_every_arm_stands_beside_the_means_of_its_curve():
    arms, curves = analysis.read_arms(), analysis.dose_curves(analysis.read_arms())
    figure = plots.dose_curves(curves, arms, "7 prompts")
    assert "7 prompts" in figure.get_suptitle()
    axis = next(axis for axis in figure.axes if axis.get_title() == plots.TITLES["mlps"])
    labels = {line.get_label() for line in axis.get_lines()}
    assert {"gpt2, fine-tuned (5 seeds)", "gpt2, layers dropped (3 seeds)"} < labels
    models = [band for band in axis.collections if isinstance(band, PathCollection)]
    for curve, shown in zip(analysis.CURVES.values(), models, strict=True):
        table = analysis.arms_table(curve.arms(arms))
        wanted = np.stack([table[curve.dose] + plots.BESIDE, table["mlps"]], axis=1)
        np.testing.assert_allclose(shown.get_offsets(), wanted)
    bands = [band for band in axis.collections if band not in models]
    for curve, band in zip(curves.values(), bands, strict=True):
        corners = {tuple(corner) for corner in np.round(band.get_paths()[0].vertices, 9)}
        for row in curve[curve["quantity"] == "mlps"].round(9).itertuples():
            assert {(row.dose, row.low), (row.dose, row.high)} <= corners
    plt.close(figure)


def test_what_is_measured_now_is_drawn_beside_the_table():
    rows = [
        {"model": model, "quantity": quantity, "now": place, "table": place + 0.5}
        | {"low": place + 0.4, "high": place + 0.7}
        for place, (quantity, model) in enumerate(itertools.product(analysis.QUANTITIES, "ab"))
    ]
    figure = plots.live_against_table(pd.DataFrame(rows))
    for axis, place in zip(figure.axes, range(0, len(rows), 2), strict=True):
        cross = next(line for line in axis.lines if line.get_marker() == "x")
        point, _, (bars,) = axis.containers[0]
        np.testing.assert_allclose(cross.get_xydata(), [[place, 0], [place + 1, 1]])
        np.testing.assert_allclose(point.get_xydata(), [[place + 0.5, 0], [place + 1.5, 1]])
        ends = [bar[:, 0] for bar in bars.get_segments()]
        np.testing.assert_allclose(ends, [[place + 0.4, place + 0.7], [place + 1.4, place + 1.7]])
    plt.close(figure)


def test_the_figure_over_training_says_which_model_and_where_its_axis_is_logarithmic():
    saved = analysis.where(analysis.read_arms(), group=analysis.OVER_TRAINING)
    figure = plots.over_training(saved, "7 prompts")
    assert figure.get_suptitle().startswith("pocket-pythia over training") and "7 prompts" in (
        figure.get_suptitle()
    )
    steps = sorted(set(saved["step"].values.tolist()))
    table = analysis.arms_table(saved).sort_values("step")
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    for part in plots.PART_COLOURS:
        np.testing.assert_allclose(lines[plots.TITLES[part]].get_ydata(), table[part])
    for axis in figure.axes:
        assert axis.get_title() and axis.get_xticks().tolist() == steps
        assert axis.get_xlabel() == f"training step (logarithmic from {steps[1]} on)"
    plt.close(figure)


def test_claims_are_of_gains_and_of_what_is_left_at_the_claimed_dose():
    """By hand: two seeds take away 0.3 and 0.1 without dropout, and give back −0.1 and 0.2 with it."""
    groups = [curve.group for curve in analysis.CURVES.values() if curve.dose == "head_dropout"]
    values = [[value] * 41 for value in (-0.3, -0.1, 9.0, -0.1, 0.2)] * len(groups)
    arms = some_arms(
        values, group=[group for group in groups for _ in range(5)], seed=[1, 2, 1, 1, 2] * len(groups),
        head_dropout=[0.0, 0.0, 0.25, 0.5, 0.5] * len(groups),
    )  # fmt: skip
    found = analysis.claimed(arms)
    assert list(found) == ["gpt2, fine-tuned", "gpt2, from scratch", "pythia, fine-tuned"]
    for of_group in found.values():
        assert of_group["head-dropout-gain-non-norm"].value == pytest.approx(0.25)
        level = of_group["head-dropout-level-non-norm"]
        assert level.value == pytest.approx(0.05)
        assert set(np.round(level.samples, 6)) == {-0.1, 0.05, 0.2}  # seeds are drawn too


# --------------------------------------------------------------------------------------- what is committed


def test_the_committed_table_is_that_of_the_committed_store():
    arms = analysis.read_arms()
    expected = analysis.arms_table(arms).to_csv(index=False, float_format="%.6g")
    assert (MODELS / "arms" / "arms.csv").read_text() == expected


def test_the_committed_arms_are_those_of_their_file():
    arms, file = analysis.read_arms(), load_arms(MODELS / "arms" / "arms.yaml")
    assert arms["name"].values.tolist() == [arm.name for arm in file]
    for name, kind in (("seed", int), ("head_dropout", float), ("attention_dropout_layer", float)):
        wanted = [kind(getattr(arm.config, name)) for arm in file if arm.config]
        assert arms[name].values[: len(wanted)].tolist() == wanted


@pytest.mark.parametrize("name", ["pocket-gpt2", "pocket-gpt2-headdrop"])
def test_a_shipped_model_is_the_one_in_the_table(name):
    table = analysis.arms_table(analysis.where(analysis.read_arms(), group=analysis.SHIPPED)).set_index(
        "name"
    )
    model = load_model(name, torch.device("cpu"))
    assert model.weights_sha256.startswith(table.loc[name, "weights_sha256"])


def test_arms_that_stand_beside_each_other_were_trained_alike():
    """Nothing but dropout and seed differs between the arms of a curve, but for what its group starts from."""
    by_group = {}
    for arm in load_arms(MODELS / "arms" / "arms.yaml"):
        if arm.config:
            by_group.setdefault(arm.group, []).append(arm.config)
    for curve in analysis.CURVES.values():
        control = by_group[curve.control or curve.group]
        configs = by_group[curve.group] + [config for config in control if config.head_dropout == 0]
        same = {
            dataclasses.replace(c, name="", seed=0, head_dropout=0.0, attention_dropout_layer=0.0)
            for c in configs
        }
        assert len(same) == 1, curve.group
        assert len({getattr(c, curve.dose) for c in configs}) > 1
