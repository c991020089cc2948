"""Training end to end on a tiny model: resume, loss, saved folder, card and bad input."""

import csv
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfrepair.cli.main import main
from selfrepair.errors import UserError
from selfrepair.paths import HELD_OUT_TEXT, MODELS, cache_dir
from selfrepair.store import code_identity
from selfrepair.training import loop
from selfrepair.training.architecture import build_model
from selfrepair.training.card import finish, render_card, render_table
from selfrepair.training.config import Phase, TrainingConfig, load_config
from selfrepair.training.data import prepare
from selfrepair.training.loop import log_spaced_steps, lr_factor, save_model, train

BATCH = 64 * 4


def phases(*steps: int, **changes) -> tuple[Phase, ...]:
    return tuple(Phase(tokens=BATCH * n, gazetteer_share=0.25, **changes) for n in steps)


TINY = TrainingConfig(
    name="tiny", architecture="gpt2", n_layers=2, n_heads=2, d_model=32, d_mlp=64, phases=phases(15, 10),
    vocab_size=512, sequence_length=64, batch_size=4, precision="float32", dropout=0.1,
)  # fmt: skip
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def data(own_cache):
    return prepare(TINY, HELD_OUT_TEXT)


def write_config(path: Path, **changes) -> Path:
    values = dataclasses.asdict(
        dataclasses.replace(TINY, **{k: v for k, v in changes.items() if k == "phases"})
    )
    values["phases"] = list(values["phases"])
    path.write_text(yaml.safe_dump(values | {k: v for k, v in changes.items() if k != "phases"}))
    return path


def command(config: Path, out: Path, *more: str, text: Path = HELD_OUT_TEXT) -> list[str]:
    return ["train", str(config), "--text", str(text), "--out", str(out), "--device", "cpu", *more]


class Killed(Exception):
    pass


def kill_at(step, monkeypatch):
    real = loop._step

    def dying(model, optimizers, batch, config, at):
        if at == step:
            raise Killed
        return real(model, optimizers, batch, config, at)

    monkeypatch.setattr(loop, "_step", dying)


@pytest.mark.slow("a training resumed at any step ends with the same weights")
@pytest.mark.parametrize(
    ("architecture", "killed_at"), [("gpt2", (0, 10, 14, 15, 16, 24)), ("gpt_neox", (13,)), ("llama", (13,))]
)
def test_resumed_at_any_step_ends_with_the_same_weights(tmp_path, monkeypatch, data, architecture, killed_at):
    config = dataclasses.replace(TINY, architecture=architecture, n_checkpoints=3)
    whole = train(config, data, tmp_path / "whole", CPU, save_every=10).state_dict()
    for step in killed_at:
        work = tmp_path / f"killed-{step}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(step, patch)
            train(config, data, work, CPU, save_every=10)
        resumed = train(config, data, work, CPU, save_every=10).state_dict()
        for name, weight in whole.items():
            torch.testing.assert_close(resumed[name], weight, rtol=0, atol=1e-5, msg=f"{name} after {step}")
        losses = [list(csv.DictReader((tmp_path / w / "curve.csv").open())) for w in ("whole", work.name)]
        for a, b in zip(*losses, strict=True):
            assert a["step"] == b["step"] and float(a["loss"]) == pytest.approx(float(b["loss"]), abs=1e-4)


@pytest.mark.parametrize("is_begun", [False, True])
def test_killed_at_the_start_of_a_phase_ends_with_the_same_weights(tmp_path, monkeypatch, data, is_begun):
    """Where a phase starts at a step at which states are saved: killed before it, and before its first one."""
    config = dataclasses.replace(TINY, phases=phases(20, 5))
    whole = train(config, data, tmp_path / "whole", CPU, save_every=10).state_dict()
    begin = loop._begin_phase

    def dying(*arguments):
        if is_begun:
            begin(*arguments)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "_begin_phase", dying)
        train(config, data, tmp_path / "killed", CPU, save_every=10)
    resumed = train(config, data, tmp_path / "killed", CPU, save_every=10).state_dict()
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=1e-5, msg=name)


def test_another_seed_ends_elsewhere(tmp_path, data):
    ends = [
        train(dataclasses.replace(TINY, seed=seed), data, tmp_path / str(seed), CPU).state_dict()[
            "transformer.wte.weight"
        ]
        for seed in (0, 1)
    ]
    assert (ends[0] - ends[1]).abs().max() > 1e-2


def test_state_of_another_configuration_is_not_continued(tmp_path, monkeypatch, data):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(12, patch)
        train(TINY, data, tmp_path / "w", CPU, save_every=10)
    with pytest.raises(UserError, match="another configuration"):
        train(dataclasses.replace(TINY, lr_matrices=0.01), data, tmp_path / "w", CPU)
    (tmp_path / "w" / "state.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged"):
        train(TINY, data, tmp_path / "w", CPU)


def a_text(folder: Path, kind: str) -> Path:
    """Some passages of a kind of held-out prose."""
    passages = (HELD_OUT_TEXT / f"{kind}.txt").read_text().split("\n---\n")[:12]
    (folder / f"{kind}.txt").write_text("\n---\n".join(passages))
    return folder / f"{kind}.txt"


def test_state_of_another_text_is_not_continued(tmp_path, monkeypatch, data):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(12, patch)
        train(TINY, data, tmp_path / "w", CPU, save_every=10)
    of_another = prepare(TINY, a_text(tmp_path, "nature"))
    before = (tmp_path / "w" / "state.pt").read_bytes()
    with pytest.raises(UserError, match="another text or tokenizer; delete it or choose another --out"):
        train(TINY, of_another, tmp_path / "w", CPU, save_every=10)
    of_another_tokenizer = dataclasses.replace(data, tokenizer=of_another.tokenizer)
    without_gazetteer = dataclasses.replace(TINY, phases=(Phase(BATCH * 25, 0.0),))
    digests = {
        one.digest(one.training_rows(without_gazetteer)) for one in (data, of_another, of_another_tokenizer)
    }
    assert len(digests) == 3
    assert (tmp_path / "w" / "state.pt").read_bytes() == before


def test_state_of_another_start_model_is_not_continued(tmp_path, monkeypatch, data):
    """One of the same name."""
    start = tmp_path / "start"
    save_model(build_model(TINY, data.tokenizer.bos_token_id), data, start)
    config = dataclasses.replace(TINY, start=str(start))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(12, patch)
        train(config, data, tmp_path / "w", CPU, save_every=10)
    save_model(build_model(dataclasses.replace(TINY, seed=1), data.tokenizer.bos_token_id), data, start)
    with pytest.raises(UserError, match="another start model; delete it or choose another --out"):
        train(config, data, tmp_path / "w", CPU, save_every=10)


def edited(monkeypatch, name: str) -> None:
    """To whoever asks for a code version, a module of the library is another."""
    content = code_identity._content

    def of_an_edited_one(file, *state):
        return content(file, *state) + (b"# edited" if file.as_posix().endswith(name) else b"")

    monkeypatch.setattr(code_identity, "_content", of_an_edited_one)


def test_state_of_other_code_is_not_continued(tmp_path, monkeypatch, data):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(12, patch)
        train(TINY, data, tmp_path / "w", CPU, save_every=10)
    edited(monkeypatch, "training/head_dropout.py")
    with pytest.raises(UserError, match="another version of the code; delete it or choose another --out"):
        train(TINY, data, tmp_path / "w", CPU, save_every=10)


@pytest.mark.parametrize(
    "changed", ["text/world.py", "text/gazetteer.py", "text/corpora.py", "training/data.py", "tokenizers"]
)
def test_prepared_rows_are_made_again_by_other_code(tmp_path, monkeypatch, changed):
    text, prepared = a_text(tmp_path, "nature"), cache_dir() / "prepared"
    prepare(TINY, text)
    before = set(prepared.iterdir())
    prepare(TINY, text)
    assert set(prepared.iterdir()) == before
    if changed == "tokenizers":
        monkeypatch.setattr("tokenizers.__version__", "0.0.1")
    else:
        edited(monkeypatch, changed)
    prepare(TINY, text)
    assert len(set(prepared.iterdir()) - before) == 1


def config_of_rows(*parts: Phase, seed: int = 0) -> TrainingConfig:
    return dataclasses.replace(TINY, phases=parts, seed=seed)


def test_rows_mix_corpus_and_gazetteer(data):
    config = config_of_rows(*phases(100))
    rows = data.training_rows(config)
    assert rows.shape == (400, 64) and (rows[:, 0] == data.tokenizer.bos_token_id).all()
    corpus = {row.tobytes() for row in data.corpus}
    validation = {row.tobytes() for row in data.validation}
    from_corpus = [row.tobytes() in corpus for row in rows]
    assert sum(from_corpus) == 300
    assert 60 < sum(from_corpus[:100]) < 90  # evenly mixed in
    assert not validation & {row.tobytes() for row in rows}
    assert np.array_equal(rows, data.training_rows(config))
    assert not np.array_equal(rows, data.training_rows(config_of_rows(*phases(100), seed=1)))
    others = data.tokenizer.decode(
        np.concatenate([r for r, c in zip(rows, from_corpus, strict=True) if not c])
    )
    assert any(place in others for place in data.gazetteer.entities["town"])


def test_corpus_rows_come_again_only_when_all_have_been_used(data):
    n = len(data.corpus)
    parts = [Phase(64 * rows, gazetteer_share=0.0) for rows in (n // 3, n - n // 3, n)]
    rows = [
        row.tobytes() for row in data.training_rows(dataclasses.replace(config_of_rows(*parts), batch_size=1))
    ]
    corpus = sorted(row.tobytes() for row in data.corpus)
    assert sorted(rows[:n]) == sorted(rows[n:]) == corpus
    assert rows[:n] != rows[n:]


def test_phases_use_their_own_phrasings_and_share(data):
    few, many = Phase(BATCH * 60, 0.5, gazetteer_phrasings=1), Phase(BATCH * 60, 0.9)
    rows = data.training_rows(config_of_rows(few, many))
    first, second = (data.tokenizer.decode(part.ravel()) for part in (rows[:240], rows[240:]))
    late = "earns a living as a"
    assert late not in first and late in second and " is a " in first


def test_schedule():
    config = dataclasses.replace(
        TINY, phases=(*phases(100, warmup=0.1, decay=0.4), *phases(10, lr_factor=0.3, warmup=0.0, decay=0.5))
    )
    factors = [lr_factor(config, step) for step in range(110)]
    assert factors[0] == pytest.approx(0.1) and factors[9:60] == pytest.approx([1.0] * 51)
    assert factors[60] == pytest.approx(1.0) and factors[99] == pytest.approx(1 / 40)
    assert np.diff(factors[60:100]) == pytest.approx([-1 / 40] * 39)
    assert factors[100:] == pytest.approx([0.3] * 6 + [0.24, 0.18, 0.12, 0.06])


def test_checkpoints_are_log_spaced():
    steps = log_spaced_steps(3000, 8)
    assert steps[0] == 0 and steps[-1] == 3000 and len(set(steps)) == 8
    ratios = np.array(steps[3:]) / np.array(steps[2:-1])
    assert ratios.max() / ratios.min() < 1.15
    with pytest.raises(UserError, match="too few"):
        log_spaced_steps(4, 8)


@pytest.mark.slow("a training learns")
def test_thirty_seconds_of_training_lower_the_loss(tmp_path, data):
    config = dataclasses.replace(TINY, phases=phases(400), dropout=0.0)
    train(config, data, tmp_path, CPU)
    rows = list(csv.DictReader((tmp_path / "curve.csv").open()))
    first, last = float(rows[0]["loss"]), float(rows[-1]["validation_loss"])
    assert last < first - 1.0


@pytest.fixture(scope="module")
def trained(own_cache, tmp_path_factory):
    """A model trained by the command, killed with SIGKILL once on the way, and its uninterrupted twin."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder / "tiny.yaml", phases=phases(400), n_checkpoints=4)
    assert main(command(config, folder / "whole")) == 0
    arguments = [sys.executable, "-m", "selfrepair.cli.main", *command(config, folder / "killed")]
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    state = folder / "killed.training" / "state.pt"
    while not state.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "killed").exists()
    subprocess.run(arguments, check=True, capture_output=True)
    return folder


@pytest.mark.slow("a killed training goes on to the same weights")
def test_killed_command_goes_on(trained):
    whole, killed = (load_file(trained / name / "model.safetensors") for name in ("whole", "killed"))
    for name, weight in whole.items():
        torch.testing.assert_close(killed[name], weight, rtol=0, atol=1e-3)  # float16 storage rounds at 1e-3
    assert not list(trained.glob("*.training"))


@pytest.mark.slow("a training leaves all that loads its model")
def test_saved_folder_is_complete(trained):
    folder = trained / "whole"
    steps = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert len(steps) == 3 and steps[0] == "step-000000"
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.float16}
    for path in (folder, *(folder / "checkpoints").iterdir()):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        assert len(tokenizer) == model.config.vocab_size == 512
        assert tokenizer.decode(tokenizer("Two words.")["input_ids"]) == "Two words."
    rows = list(csv.DictReader((folder / "training_curve.csv").open()))
    assert tuple(rows[0]) == loop.CURVE_COLUMNS and int(rows[-1]["step"]) == 400


@pytest.mark.slow("a trained model's card says what was measured")
def test_card_states_what_was_measured(trained):
    metrics = json.loads((trained / "whole" / "metrics.json").read_text())
    card = (trained / "whole" / "README.md").read_text()
    assert f"{metrics['parameters']:,} parameters" in card
    for name in ("loss_unseen_corpus", "loss_held_out_prose", "trigram_loss_held_out_prose"):
        assert f"{metrics[name]:.3f}" in card
    for text in metrics["samples"]:
        assert text.splitlines()[0] in card
    for file in HELD_OUT_TEXT.glob("*.txt"):
        assert f"- {file.name}" in card
    assert metrics["training_tokens"] == 400 * 4 * 64


@pytest.mark.slow("a trained model's card names its sources")
def test_card_names_the_sources_of_the_table(trained, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text(
        "\n---\n".join((HELD_OUT_TEXT / f"{kind}.txt").read_text() for kind in ("nature", "stories"))
    )
    (text / "SOURCES.csv").write_text(
        'file,author,title,github_repository,licence\na,A. Writer,"Much, Ado",a/b,CC0-1.0\n'
    )
    config = write_config(tmp_path / "tiny.yaml", phases=phases(4))
    assert main(command(config, tmp_path / "model", text=text)) == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert "- A. Writer, *Much, Ado* ([a/b](https://github.com/a/b), CC0-1.0)" in card


@pytest.mark.slow("a model is evaluated by the command that its card names")
def test_evaluate_prints_the_table(trained, capsys):
    assert main(["evaluate", str(trained / "whole"), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    metrics = json.loads((trained / "whole" / "metrics.json").read_text())
    assert f"{metrics['trigram_loss_held_out_prose']:.3f}" in out


@pytest.mark.slow("a training never overwrites a model unasked")
def test_existing_model_is_never_overwritten_unasked(trained, tmp_path, capsys):
    config = write_config(tmp_path / "tiny.yaml", phases=phases(4))
    out = tmp_path / "model"
    assert main(command(config, out)) == 0
    before = (out / "model.safetensors").read_bytes()
    config = write_config(tmp_path / "tiny.yaml", phases=phases(8))
    capsys.readouterr()
    one_line(capsys, main(command(config, out)), "exists already")
    assert (out / "model.safetensors").read_bytes() == before
    assert main(command(config, out, "--overwrite")) == 0
    assert f"tiny: replaces {out} when it is done" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() != before


def one_line(capsys, status: int, said: str) -> None:
    error = capsys.readouterr().err
    assert status == 1
    assert error.startswith("selfrepair: error: ") and error.count("\n") == 1 and said in error, error


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "rwkv"}, "unknown architecture 'rwkv'"),
        ({"layers": 3}, "unknown key 'layers'"),
        ({"n_layers": "six"}, "n_layers must be int"),
        ({"n_layers": True}, "n_layers must be int"),
        ({"n_layers": -1}, "n_layers must be positive"),
        ({"phases": phases(0)}, "less than one batch"),
        ({"phases": ()}, "list of phases"),
        ({"phases": phases(9, warmup=0.7, decay=0.7)}, "at most 1"),
        ({"phases": phases(9, lr_factor=-1.0)}, "lr_factor"),
        ({"n_heads": 5}, "multiple of n_heads"),
        ({"dropout": 1.5}, "dropout must lie in [0, 1)"),
        ({"head_dropout": 1.0}, "head_dropout must lie in [0, 1)"),
        ({"attention_dropout_layer": -0.1}, "attention_dropout_layer must lie in [0, 1)"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'"),
        ({"precision": "int8"}, "unknown precision"),
    ],
)
def test_bad_configuration_is_one_line(tmp_path, capsys, changes, said):
    with pytest.raises(UserError) as error:
        load_config(write_config(tmp_path / "bad.yaml", **changes))
    assert said in str(error.value)
    one_line(capsys, main(command(tmp_path / "bad.yaml", tmp_path / "out")), said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"a: [", "not YAML"), (b"- 1\n", "key: value"), (b"name: x\n", "missing architecture")],
)
def test_malformed_configuration_is_one_line(tmp_path, capsys, content, said):
    (tmp_path / "bad.yaml").write_bytes(content)
    one_line(capsys, main(command(tmp_path / "bad.yaml", tmp_path / "out")), said)


def test_missing_configuration_and_text_are_one_line(tmp_path, capsys):
    one_line(capsys, main(command(tmp_path / "none.yaml", tmp_path / "out")), "cannot be read")
    config = write_config(tmp_path / "tiny.yaml")
    (tmp_path / "empty").mkdir()
    status = main(command(config, tmp_path / "out", text=tmp_path / "empty"))
    assert status == 1 and "no .txt or .txt.gz file" in capsys.readouterr().err.splitlines()[-1]


def test_less_text_than_one_batch_is_said(tmp_path):
    (tmp_path / "short.txt").write_text("Only a few words, and then no more of them.\n" * 20)
    with pytest.raises(UserError, match="too few for one batch"):
        prepare(TINY, tmp_path / "short.txt")


def test_unavailable_device_is_one_line(tmp_path, capsys):
    config = write_config(tmp_path / "tiny.yaml")
    one_line(capsys, main([*command(config, tmp_path / "out"), "--device", "abacus"]), "device 'abacus'")


@pytest.mark.slow("a full disk loses nothing of a training")
def test_full_disk_is_one_line_and_loses_nothing(tmp_path, small_disk, capsys):
    disk = small_disk(2)
    config = write_config(tmp_path / "tiny.yaml", phases=phases(210), n_checkpoints=3)
    filler = disk / "filler"
    filler.write_bytes(bytes(1_500_000))
    status = main(command(config, disk / "model"))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 1 and "disk full" in last and "selfrepair: error" in last
    assert not (disk / "model").exists()
    filler.unlink()
    assert main(command(config, tmp_path / "twin")) == 0
    assert main(command(config, disk / "model")) == 0
    twin, model = (load_file(path / "model.safetensors") for path in (tmp_path / "twin", disk / "model"))
    assert all(torch.equal(twin[name], model[name]) for name in twin)


def made_by_training(folder: Path) -> Path:
    """A folder as a training leaves it, as far as it counts whether it may be replaced."""
    (folder / "checkpoints" / "step-000000").mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"config": {"gazetteer_seed": 0}}))
    for name in ("config.json", "model.safetensors", "training_curve.csv", "README.md"):
        (folder / name).touch()
    return folder


def with_a_thesis(folder: Path) -> None:
    (folder / "thesis.txt").write_text("years of work")


def without_metrics(folder: Path) -> None:
    (folder / "metrics.json").unlink()


def of_another_kind(folder: Path) -> None:
    (folder / "metrics.json").write_text('{"accuracy": 1}')


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("years of work")


def a_link(folder: Path) -> None:
    folder.rename(folder.with_name("real"))
    folder.symlink_to("real")


def work_of_others(folder: Path) -> None:
    work = folder.with_name(f"{folder.name}.training")
    work.mkdir()
    with_a_thesis(work)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_a_thesis, "model: holds thesis.txt, which no training made"),
        (without_metrics, "model: no training made this folder (metrics.json is not as one leaves it)"),
        (of_another_kind, "model: no training made this folder (its metrics.json is not"),
        (emptied, "model: no training made this folder (config.json, metrics.json, training_curve.csv"),
        (a_file, "model: is no folder"),
        (a_link, "model: is no folder"),
        (work_of_others, "model.training: holds thesis.txt, which no training made"),
    ],
)
def test_overwrite_replaces_only_what_a_training_made(tmp_path, capsys, change, said):
    """And what it refuses, it leaves as it was."""
    config = write_config(tmp_path / "tiny.yaml")
    change(made_by_training(tmp_path / "model"))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    one_line(capsys, main(command(config, tmp_path / "model", "--overwrite")), said)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.slow("a training replaces nothing that changed meanwhile")
def test_a_folder_changed_while_a_model_was_trained_is_not_replaced(tmp_path, data):
    out, work = made_by_training(tmp_path / "model"), tmp_path / "model.training"
    config = dataclasses.replace(TINY, phases=phases(2))
    model = train(config, data, work, CPU)
    with_a_thesis(out)
    with pytest.raises(UserError, match=r"holds thesis\.txt, which no training made"):
        finish(model, config, data, work, HELD_OUT_TEXT, out)
    assert (out / "thesis.txt").exists() and (work / "curve.csv").exists()


@pytest.mark.parametrize("out", [".", "..", "../here"])
def test_the_working_directory_is_not_trained_into(tmp_path, monkeypatch, capsys, out):
    config = write_config(tmp_path / "tiny.yaml")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    one_line(capsys, main(command(config, out, "--overwrite")), "holds the folder that you are in")
    assert here.is_dir()


def test_without_a_home_folder_is_one_line(tmp_path, monkeypatch, capsys):
    """A user id without a passwd entry, as containers have, and no HOME."""

    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    config = write_config(tmp_path / "tiny.yaml")
    one_line(capsys, main(command(config, tmp_path / "out")), "set HOME to a folder")


def test_names_come_to_nothing_in_a_card():
    config = dataclasses.replace(TINY, name="<img src=x onerror=alert(1)>")
    metrics = json.loads((MODELS / "pocket-gpt2" / "metrics.json").read_text())
    card = render_card(
        config, metrics | {"samples": ["a < b<script>alert(2)</script><!--<|endoftext|>"]}, ["a"]
    )
    headings = [line for line in card.splitlines() if line.startswith("# ")]
    assert headings == ["# &#60;img src=x onerror=alert(1)&#62;"] and "<script" not in card
    assert "> a < b&lt;script>alert(2)&lt;/script>&lt;!--<|endoftext|>" in card
    assert "<b>" not in render_table({"<b>x|y": metrics}) and "&#60;b&#62;x&#124;y" in render_table(
        {"<b>x|y": metrics}
    )
