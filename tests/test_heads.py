"""Every head ablated: values against the reference, batches, memory, and bad input from the command line."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from families import VOCAB, build_family, random_tokens, save_family
from tasks import OF_HEADS, TOKENS, heads_task
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    T5Config,
)

from selfrepair.cli import commands
from selfrepair.cli.main import main
from selfrepair.engine import batches, optimal
from selfrepair.engine import head_ablation as engine_module
from selfrepair.engine.identity_check import IDENTITY_POSITIONS
from selfrepair.errors import UserError
from selfrepair.measure import pairs
from selfrepair.measure.task import Task
from selfrepair.models.loading import _why_not_loaded
from selfrepair.models.support import check_supported
from selfrepair.paths import MODELS, PUBLISHED
from selfrepair.store.stores import open_store

N = len(TOKENS)
VARIABLES = {*OF_HEADS, "sigma_clean", "token"}


@pytest.fixture
def measured(folder, model, token_file):
    """``measured(out, ablation)``: the heads of the small model."""

    def measure(out, ablation="zero", tokens=token_file):
        return open_store(heads_task(folder, tokens, out, ablation=ablation).merge([model]))

    return measure


def command(folder, tokens, out, *more):
    return [
        "sweep",
        "--model",
        str(folder),
        "--tokens",
        str(tokens),
        "--device",
        "cpu",
        "--out",
        str(out),
        *more,
    ]


@pytest.mark.parametrize("kind", reference.KINDS)
def test_store_equals_the_reference_for_every_prompt(tmp_path, folder, measured, kind, monkeypatch):
    monkeypatch.setattr(pairs, "SHARD_PAIRS", 3)
    dataset = measured(tmp_path, kind)
    assert set(dataset.data_vars) == VARIABLES
    assert dict(dataset.sizes) == {"layer": 3, "head": 4, "prompt": N, "position": 11, "token_position": 12}
    assert dataset.prompt.values.tolist() == list(range(N))
    assert dataset.donor.values.tolist() == [(i + N // 2) % N for i in range(N)]
    prompts = TOKENS[:N]
    assert np.array_equal(dataset.token, prompts)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokens = torch.from_numpy(prompts)
    for layer, head in ((0, 1), (1, 2), (2, 0)):
        wanted = reference.ablate(hf, tokens, layer, head, kind)
        for name in VARIABLES - {"token"}:
            got = dataset[name] if name == "sigma_clean" else dataset[name][layer, head]
            assert np.abs(got.values - wanted[name].numpy()).max() < 1e-4, name


@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.slow("numbers do not depend on how many prompts go through a model at once")
def test_independent_of_the_batch_size(tmp_path, measured, kind, monkeypatch):
    stores = []
    for at_once in (1, 4, 16):
        monkeypatch.setattr(pairs, "SHARD_PAIRS", at_once)
        for module in (engine_module, batches):
            monkeypatch.setattr(module, "rows_that_fit", lambda *_: 1000)
        stores.append(measured(tmp_path / str(at_once), kind))
    monkeypatch.setattr(batches, "CLEAN_RUN_BYTES", 1)
    stores.append(measured(tmp_path / "one pair at a time", kind))
    for name in VARIABLES:
        for other in stores[1:]:
            np.testing.assert_allclose(stores[0][name], other[name], rtol=1e-5, atol=1e-5)


def test_heads_command_writes_the_published_columns(tmp_path, folder, token_file, capsys):
    assert main(command(folder, token_file, tmp_path)) == 0
    store = capsys.readouterr().out.splitlines()[-1]
    assert main(["heads", store, "--fraction", "0.1", "--csv", str(tmp_path / "heads.csv")]) == 0
    table = pd.read_csv(tmp_path / "heads.csv")
    published = pd.read_csv(PUBLISHED / "published_head_breakdown_top2pct.csv")
    assert list(table.columns[: len(published.columns)]) == list(published.columns)
    assert len(table) == 12 and (table["n_tokens"] == np.ceil(0.1 * N * 11)).all()
    assert main(["heads", store]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 13
    one_line(capsys, main(["heads", store, "--fraction", "1e-3"]), "tokens is less than one token: raise it")


def one_line(capsys, status, *said):
    error = capsys.readouterr().err
    assert status == 1, error
    assert error.startswith("selfrepair: error: ") and error.count("\n") == 1, error
    for text in said:
        assert text in error, error


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--prompt-len", "8"], "rows are taken as long as they are"),
        (["--n-prompts", "3"], "even"),
        (["--n-prompts", "-2"], "even"),
        (["--n-prompts", "0"], "even"),
        (["--n-prompts", "24"], "24 were asked for"),
        (["--device", "abacus"], "not available"),
        (["--seed", "-1"], "seed"),
        (["--text", "x"], "not several"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, folder, token_file, capsys, more, said):
    one_line(capsys, main(command(folder, token_file, tmp_path / "out", *more)), said)
    assert not (tmp_path / "out").exists()


def test_arguments_that_no_command_has_are_one_line(capsys):
    for arguments in (
        ["sweep"],
        ["sweep", "--model", "x", "--out", "y", "--ablation", "none"],
        ["prune"],
        [],
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (np.zeros((4, 12)), "integer"),
        (np.zeros(12, dtype=int), "integer"),
        (np.full((4, 12), -1), "negative"),
        (np.full((4, 12), VOCAB), "vocabulary"),
        (np.zeros((4, 33), dtype=int), "context"),
        (np.zeros((1, 12), dtype=int), "1 prompts"),
        (np.array([{}]), "not an .npy"),
        (b"PK nonsense", "not an .npy"),
    ],
)
def test_bad_token_files_are_one_line(tmp_path, folder, capsys, content, said):
    path = tmp_path / "bad.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    one_line(capsys, main(command(folder, path, tmp_path / "out")), said)


def test_missing_files_are_one_line(tmp_path, folder, token_file, capsys):
    one_line(capsys, main(command(folder, tmp_path / "none.npy", tmp_path)), "no such file")
    one_line(capsys, main(command(tmp_path / "none", token_file, tmp_path)), "no such folder")
    (tmp_path / "empty").mkdir()
    one_line(capsys, main(command(tmp_path / "empty", token_file, tmp_path)), "no config.json")
    arguments = [
        "sweep",
        "--model",
        str(folder),
        "--text",
        str(tmp_path / "none.txt"),
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    one_line(capsys, main(arguments), "no such file")
    one_line(capsys, main(["heads", str(tmp_path / "none.zarr")]), "no such store")
    one_line(capsys, main(["heads", str(tmp_path / "empty")]), "no store")


def test_heads_of_another_measurement_are_refused_in_one_line(tmp_path, folder, token_file, model, capsys):
    tokens = heads_task(folder, token_file, tmp_path).needed["tokens"].merge([model])
    one_line(capsys, main(["heads", str(tokens)]), "no sweep of heads")


def test_a_folder_of_good_stores_is_not_called_damaged(tmp_path, folder, token_file, model, capsys):
    """Nobody is told to delete it; a store in it is named, in a run's folder too."""
    store = heads_task(folder, token_file, tmp_path / "run" / "measured").merge([model])
    for given in (tmp_path / "run", store.parent):
        assert main(["heads", str(given)]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "a folder that holds stores; give one of them, such as" in said
        assert str(store.parent) in said and "delete" not in said and "damaged" not in said
    (store / "zarr.json").write_bytes(b"")
    one_line(capsys, main(["heads", str(store)]), "damaged, or no store of this suite", "measure again")


def test_heads_of_several_stores_are_one_table(tmp_path, folder, token_file, model, capsys):
    """As a pattern gives them that more than one store has come to fit; each row says of which it is."""
    stores = [
        str(heads_task(folder, token_file, tmp_path, ablation=kind).merge([model]))
        for kind in ("zero", "mean")
    ]
    tables = []
    for given in ([stores[0]], [stores[1]], stores):
        assert main(["heads", *given, "--csv", str(tmp_path / "heads.csv")]) == 0
        tables.append(pd.read_csv(tmp_path / "heads.csv"))
    assert "store" not in tables[0] and list(tables[2]["store"].unique()) == stores
    for store, table in zip(stores, tables[:2], strict=True):
        of_store = tables[2][tables[2]["store"] == store].drop(columns="store").reset_index(drop=True)
        pd.testing.assert_frame_equal(of_store, table, check_dtype=False)
    one_line(capsys, main(["heads", stores[0], str(tmp_path / "none.zarr")]), "none.zarr: no such store")


def test_an_odd_last_row_is_left_out_and_that_is_said(tmp_path, folder, capsys):
    np.save(tmp_path / "odd.npy", TOKENS[:5])
    assert main(command(folder, tmp_path / "odd.npy", tmp_path / "out")) == 0
    done = capsys.readouterr()
    (said,) = [line for line in done.err.splitlines() if "odd.npy" in line]
    assert "its last row is left out" in said and said.endswith("it has 5")
    assert np.array_equal(open_store(done.out.strip())["token"], TOKENS[:4])
    for rows, more in ((5, ["--n-prompts", "4"]), (4, [])):
        np.save(tmp_path / "odd.npy", TOKENS[:rows])
        assert main(command(folder, tmp_path / "odd.npy", tmp_path / "out", *more)) == 0
        assert "left out" not in capsys.readouterr().err


def test_prompts_that_an_ablation_learns_from_are_left_of_all(tmp_path, folder, capsys, monkeypatch):
    """Without --n-prompts, all are measured on but these, which nothing is measured on."""
    rows = random_tokens(optimal.N_PROMPTS + 5).numpy()
    np.save(tmp_path / "all.npy", rows)
    taken = []
    monkeypatch.setattr(Task, "merge", lambda task, *_, **__: taken.append(task.settings) or task.path)
    for kind in ("optimal", "mean"):
        assert main(command(folder, tmp_path / "all.npy", tmp_path / "out", "--ablation", kind)) == 0
        assert f"it has {len(rows)}\n" in capsys.readouterr().err
    assert [settings["n_prompts"] for settings in taken] == [4, len(rows) - 1]


def test_the_working_directory_as_a_model_has_its_name(tmp_path, folder, token_file, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(command(".", token_file, tmp_path / "out")) == 0
    store = Path(capsys.readouterr().out.strip())
    assert (
        store.name.startswith("tiny-gpt2-heads-resample-") and open_store(store).attrs["model"] == "tiny-gpt2"
    )


def test_no_network_is_one_line(tmp_path, token_file, capsys, folder):
    one_line(
        capsys,
        main(command("gpt2", token_file, tmp_path)),
        "gpt2",
        "not reachable",
        "local model folder",
        "embedded models",
    )
    arguments = [
        "sweep",
        "--model",
        str(folder),
        "--dataset",
        "pile",
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    one_line(capsys, main(arguments), "NeelNanda/pile-10k", "network")


def test_evaluating_no_causal_language_model_says_what_sweep_says(tmp_path, capsys):
    T5Config().save_pretrained(tmp_path)
    for arguments in (["evaluate", str(tmp_path)], command(tmp_path, "none.npy", tmp_path / "out")):
        said = f"{tmp_path}: architecture 't5' is not supported: an encoder-decoder"
        one_line(capsys, main(arguments), said)


def test_evaluating_a_model_without_a_tokenizer_is_one_line(tmp_path, capsys):
    build_family("gpt2").save_pretrained(tmp_path)
    capsys.readouterr()
    arguments = ["evaluate", str(tmp_path), "--device", "cpu"]
    one_line(capsys, main(arguments), "no tokenizer with a vocabulary")


def test_a_long_reason_is_cut_between_words():
    said = _why_not_loaded("mine", str(MODELS), ValueError("words\n" * 99))
    assert re.search(r"\(ValueError: (words )+\[\.\.\.\]\)", said)


@pytest.mark.parametrize("option", ["--model", "--out", "--text", "--tokens", "--dataset"])
def test_an_empty_argument_is_one_line(capsys, option):
    """An empty path would be the working directory."""
    given = ["sweep", "--model", "pocket-gpt2", "--out", "out", option, ""]
    with pytest.raises(SystemExit, match=r"^2$"):
        main(given)
    said = capsys.readouterr().err
    assert f"argument {option}: is empty" in said and said.count("\n") == 1


@pytest.mark.parametrize("below", [".", "further/below"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["sweep", "--model", "pocket-gpt2"],
        ["plan"],
        ["notebooks"],
        ["arms", "arms.yaml"],
        ["train", "x.yaml", "--text", "."],
    ],
)
def test_a_file_in_the_place_of_a_folder_is_said_at_once(tmp_path, monkeypatch, capsys, arguments, below):
    monkeypatch.setattr(commands, arguments[0], lambda _: pytest.fail("began"))
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / below)
    one_line(capsys, main([*arguments, "--out", out]), "file: is no folder but a file; give --out a folder")


def test_damaged_weights_are_one_line(tmp_path, token_file, capsys):
    folder = save_family("gpt2", tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    one_line(
        capsys, main(command(folder, token_file, tmp_path)), "not a loadable", ": check the files of its"
    )
    for file in folder.glob("tokenizer*"):
        file.rename(tmp_path / file.name)
    one_line(capsys, main(command(folder, token_file, tmp_path)), "save the model's tokenizer in its folder")
    for file in tmp_path.glob("tokenizer*"):
        file.rename(folder / file.name)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_layer=1, n_head=2, n_embd=8, n_positions=32))
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    for file in folder.glob("tokenizer*"):
        (tmp_path / "nan" / file.name).write_bytes(file.read_bytes())
    one_line(capsys, main(command(tmp_path / "nan", token_file, tmp_path)), "not finite")


def test_unsupported_architectures_are_refused_by_name_before_weights(tmp_path, token_file, capsys):
    Gemma2Config(num_hidden_layers=1, hidden_size=8).save_pretrained(tmp_path / "gemma")
    one_line(capsys, main(command(tmp_path / "gemma", token_file, tmp_path)), "gemma2", "soft cap")
    with pytest.raises(UserError, match="norms after attention"):
        check_supported(OPTConfig(do_layer_norm_before=False), "opt-350m")
    with pytest.raises(UserError, match="another width"):
        check_supported(OPTConfig(word_embed_proj_dim=8), "narrow")


@pytest.mark.slow("a full disk is said in one line, and nothing computed is lost")
def test_full_disk_is_one_line_and_the_run_goes_on_later(tmp_path, small_disk, folder, capsys):
    disk = small_disk(2)
    prompts = tmp_path / "many.npy"
    np.save(prompts, random_tokens(20 * N).numpy())
    status = main(command(folder, prompts, disk))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 1 and "disk full" in last
    assert list(disk.glob("*.shards/*.zarr"))  # what was computed is kept
    subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
    assert main(command(folder, prompts, disk)) == 0


def test_out_of_memory_halves_the_batch_and_loses_nothing(tmp_path, measured, monkeypatch):
    wanted = measured(tmp_path / "roomy", "resample")
    real, sizes = engine_module.ablate_heads, []

    def cramped(model, tokens, replacement):
        sizes.append(len(tokens))
        if len(tokens) > room:
            raise torch.OutOfMemoryError
        return real(model, tokens, replacement)

    monkeypatch.setattr(engine_module, "ablate_heads", cramped)
    for module in (engine_module, batches):
        monkeypatch.setattr(module, "rows_that_fit", lambda *_: 1000)
    room = 6
    found = measured(tmp_path / "cramped", "resample")
    assert sizes[0] == N and max(sizes[-1:]) <= room
    for name in VARIABLES:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-5)
    room = 1
    with pytest.raises(UserError, match="too little memory for one pair"):
        measured(tmp_path / "nothing")


def test_nothing_the_size_of_vocabulary_times_tokens_is_made(tmp_path, measured):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        with_vocabulary = 0

        def __torch_dispatch__(self, operation, types, arguments=(), named=None):
            result = operation(*arguments, **(named or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.ndim > 2 and tensor.shape[-1] == VOCAB:
                    self.with_vocabulary = max(self.with_vocabulary, tensor.shape[:-1].numel())
            return result

    longer = random_tokens(30, 30).numpy()
    np.save(tmp_path / "longer.npy", longer)
    with Largest() as largest:
        measured(tmp_path, "resample", tmp_path / "longer.npy")
    assert 0 < largest.with_vocabulary <= 2 * IDENTITY_POSITIONS < longer.size
