"""Sweeps on disk: donors, batches, identity, resuming, damage, and bad input from the command line."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from families import VOCAB, load_family, random_tokens, save_family
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GPT2LMHeadModel, OPTConfig

from selfrepair.engine import ablations as replacement_module
from selfrepair.store import datasets as results
from selfrepair.measure import heads as sweep_module
from selfrepair.cli import main
from selfrepair.text.corpora import Prompts
from selfrepair.errors import UserError
from selfrepair.store.manifest import manifest_of
from selfrepair.models.loading import load_model
from selfrepair.engine.ablations import ABLATIONS
from selfrepair.store.datasets import open_store
from selfrepair.models.architectures import check_supported
from selfrepair.measure.heads import sweep

N = 22
PROMPTS = Prompts(random_tokens(N).numpy(), "random")
VARIABLES = {
    "direct_effect",
    "ablated_direct_effect",
    "logit_change",
    "self_repair_heads",
    "self_repair_mlps",
    "sigma_ablated",
    "sigma_clean",
    "token",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_family("gpt2", tmp_path_factory.mktemp("family") / "tiny-gpt2")


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder), "cpu")


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "ids.npy"
    np.save(path, PROMPTS.tokens)
    return path


def command(folder, tokens, out, *more):
    return ["sweep", "--model", str(folder), "--tokens", str(tokens), "--device", "cpu", "--out", str(out), *more]


@pytest.mark.parametrize("kind", ABLATIONS)
def test_store_equals_the_reference_for_every_prompt(tmp_path, folder, model, kind, monkeypatch):
    monkeypatch.setattr(results, "SHARD_PAIRS", 3)
    dataset = open_store(sweep(model, PROMPTS, kind, tmp_path, progress=False))
    assert set(dataset.data_vars) == VARIABLES
    assert dict(dataset.sizes) == {"layer": 3, "head": 4, "prompt": N, "position": 11, "token_position": 12}
    assert dataset.donor.values.tolist() == [(i + N // 2) % N for i in range(N)]
    assert np.array_equal(dataset.token, PROMPTS.tokens)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokens = torch.from_numpy(PROMPTS.tokens)
    for layer, head in ((0, 1), (1, 2), (2, 0)):
        wanted = reference.ablate(hf, tokens, layer, head, kind)
        for name in VARIABLES - {"token"}:
            got = dataset[name] if name == "sigma_clean" else dataset[name][layer, head]
            assert np.abs(got.values - wanted[name].numpy()).max() < 1e-4, name


@pytest.mark.parametrize("kind", ABLATIONS)
def test_independent_of_the_batch_size(tmp_path, model, kind, monkeypatch):
    stores = []
    for pairs in (1, 4, 16):
        monkeypatch.setattr(results, "SHARD_PAIRS", pairs)
        monkeypatch.setattr(sweep_module, "rows_that_fit", lambda *_: 1000)
        stores.append(open_store(sweep(model, PROMPTS, kind, tmp_path / str(pairs), progress=False)))
    monkeypatch.setattr(replacement_module, "CLEAN_RUN_BYTES", 1)
    stores.append(open_store(sweep(model, PROMPTS, kind, tmp_path / "one pair at a time", progress=False)))
    for name in VARIABLES:
        for other in stores[1:]:
            np.testing.assert_allclose(stores[0][name], other[name], rtol=1e-5, atol=1e-5)


def test_store_of_a_hub_model_lies_in_no_folder_of_its_own():
    name = results.store_name("EleutherAI/pythia-160m", "zero", {"seed": 0})
    assert name.startswith("EleutherAI--pythia-160m-zero-") and "/" not in name
    assert name != results.store_name("EleutherAI/pythia-160m", "zero", {"seed": 1})


def test_attributes_say_what_made_the_numbers(tmp_path, model):
    attributes = open_store(sweep(model, PROMPTS, "zero", tmp_path, seed=3, progress=False)).attrs
    assert attributes["model"] == "tiny-gpt2" and attributes["ablation"] == "zero" and attributes["seed"] == 3
    assert attributes["weights_sha256"] == model.weights_hash() and attributes["tokens_sha256"] == PROMPTS.sha256
    assert attributes["dtype"] == "float32" and attributes["n_prompts"] == N and attributes["prompt_len"] == 12


def test_same_inputs_same_store_and_nothing_computed_again(tmp_path, model, monkeypatch):
    path = sweep(model, PROMPTS, "zero", tmp_path, progress=False)
    monkeypatch.setattr(sweep_module, "ablate_heads", lambda *_: pytest.fail("computed again"))
    assert sweep(model, PROMPTS, "zero", tmp_path, progress=False) == path
    with pytest.raises(pytest.fail.Exception):
        sweep(model, PROMPTS, "resample", tmp_path, progress=False)


def test_changed_inputs_are_another_store(model, tmp_path):
    base = sweep_module.describe(model, PROMPTS, "mean", 0)
    other_prompts = Prompts(PROMPTS.tokens[::-1], "random")
    other_model = load_family("neox-parallel", tmp_path)
    described = [base, sweep_module.describe(model, PROMPTS, "zero", 0), sweep_module.describe(model, PROMPTS, "mean", 1)]
    described += [sweep_module.describe(model, other_prompts, "mean", 0), sweep_module.describe(other_model, PROMPTS, "mean", 0)]
    assert len({results.identity(d) for d in described}) == 5
    assert results.identity(base) == results.identity(dict(reversed(base.items())))


def test_weights_hash_sees_every_weight(model, folder):
    twin = load_model(str(folder), "cpu")
    assert twin.weights_hash() == model.weights_hash()
    with torch.no_grad():
        twin.final_norm.bias[3] += 1e-3
    assert twin.weights_hash() != model.weights_hash()


def test_damaged_and_missing_shards_are_redone(tmp_path, model, monkeypatch):
    monkeypatch.setattr(results, "SHARD_PAIRS", 3)
    whole = open_store(sweep(model, PROMPTS, "mean", tmp_path / "whole", progress=False))
    monkeypatch.setattr(results, "write_store", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sweep(model, PROMPTS, "mean", tmp_path, progress=False)
    monkeypatch.undo()
    monkeypatch.setattr(results, "SHARD_PAIRS", 3)
    (shards,) = tmp_path.glob("*.shards")
    damaged = shards / "000003.npz"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    (shards / "000006.npz").unlink()
    (shards / "000009.sha256").write_text("")
    done = []
    real = sweep_module._ablate_pairs
    monkeypatch.setattr(sweep_module, "_ablate_pairs", lambda *a: done.append(int(a[2][0])) or real(*a))
    again = open_store(sweep(model, PROMPTS, "mean", tmp_path, progress=False))
    assert done == [3, 6, 9]
    for name in VARIABLES:
        assert np.array_equal(whole[name], again[name])
    assert not list(tmp_path.glob("*.shards"))


def test_manifest_counts_the_seconds_of_every_run_that_computed_shards(tmp_path, model, monkeypatch):
    monkeypatch.setattr(results, "SHARD_PAIRS", 4)
    clock = itertools.count(step=7.0)  # seven seconds go by whenever somebody looks: a shard takes as long
    monkeypatch.setattr(sweep_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    work = sweep_module.Sweep(model, PROMPTS, "zero", tmp_path)
    assert list(work.starts) == [0, 4, 8] and work.compute([4]) == 7
    store = sweep(model, PROMPTS, "zero", tmp_path, progress=False)
    assert json.loads(manifest_of(store).read_text())["seconds"] == 21


def test_damaged_store_is_noticed_and_redone(tmp_path, model):
    path = sweep(model, PROMPTS, "zero", tmp_path, progress=False)
    whole = open_store(path)
    chunk = max((p for p in (path / "logit_change").rglob("*") if p.is_file() and p.name != "zarr.json"), key=lambda p: p.stat().st_size)
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        open_store(path)
    assert np.array_equal(open_store(sweep(model, PROMPTS, "zero", tmp_path, progress=False)).logit_change, whole.logit_change)


def test_killed_while_computing_goes_on_to_the_same_bytes(tmp_path, folder, token_file):
    prompts = tmp_path / "many.npy"
    np.save(prompts, np.tile(PROMPTS.tokens, (12, 1)))
    arguments = [sys.executable, "-m", "selfrepair.cli", *command(folder, prompts, tmp_path / "out")]
    kills = 0
    for n_shards in (1, 3, 5):
        process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(tmp_path.glob("out/*.shards/*.npz"))) < n_shards:
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 1
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*.shards/*.npz")}
    last = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert stamps or kills < 3
    whole = subprocess.run([*arguments[:-1], str(tmp_path / "whole")], capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert os.path.basename(last) == os.path.basename(whole)
    a, b = open_store(last), open_store(whole)
    for name in VARIABLES:
        assert np.array_equal(a[name], b[name])
    assert a.attrs == b.attrs


def test_killed_around_every_step_on_the_disk(tmp_path, folder):
    prompts, n_shards = tmp_path / "many.npy", 2
    np.save(prompts, np.tile(PROMPTS.tokens, (2, 1)))
    script = [sys.executable, str(Path(__file__).with_name("kill_sweep.py")), str(tmp_path / "out")]
    arguments = ["sweep", "--model", str(folder), "--tokens", str(prompts), "--device", "cpu"]
    done = subprocess.run([*script, *arguments], capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    moments = [json.loads(line) for line in done.stdout.splitlines()]
    assert [moment["killed"] for moment in moments] == [True] * (len(moments) - 1) + [False] and len(moments) > 4 * n_shards
    assert {moment["status"] for moment in moments} == {0}
    whole = open_store(moments[-1]["store"])
    for moment in moments:
        assert moment["computed"] == (0 if moment["kept"] == "all" else n_shards - moment["kept"])
        assert os.path.basename(moment["store"]) == os.path.basename(moments[-1]["store"])
        assert open_store(moment["store"]).identical(whole)
    assert {moment["kept"] for moment in moments} == {0, 1, 2, "all"}
    left = {path.suffix for path in tmp_path.glob("out/*/*")}
    assert left == {".zarr", ".lock", ".json"}


def test_heads_command_writes_the_published_columns(tmp_path, folder, token_file, capsys):
    assert main(command(folder, token_file, tmp_path)) == 0
    store = capsys.readouterr().out.splitlines()[-1]
    assert main(["heads", store, "--fraction", "0.1", "--csv", str(tmp_path / "heads.csv")]) == 0
    table = pd.read_csv(tmp_path / "heads.csv")
    published = pd.read_csv(sweep_module.results.Path(__file__).parents[1] / "shared/published/published_head_breakdown_top2pct.csv")
    assert list(table.columns[: len(published.columns)]) == list(published.columns)
    assert len(table) == 12 and (table["n_tokens"] == np.ceil(0.1 * N * 11)).all()
    assert main(["heads", store]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 13


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
    for arguments in (["sweep"], ["sweep", "--model", "x", "--out", "y", "--ablation", "none"], ["prune"], []):
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
    arguments = ["sweep", "--model", str(folder), "--text", str(tmp_path / "none.txt"), "--out", str(tmp_path), "--device", "cpu"]
    one_line(capsys, main(arguments), "no such file")
    one_line(capsys, main(["heads", str(tmp_path / "none.zarr")]), "no such store")
    one_line(capsys, main(["heads", str(tmp_path / "empty")]), "no sweep")


def test_no_network_is_one_line(tmp_path, token_file, capsys, folder):
    one_line(capsys, main(command("gpt2", token_file, tmp_path)), "gpt2", "not reachable", "local model folder", "--profile pocket")
    arguments = ["sweep", "--model", str(folder), "--dataset", "pile", "--out", str(tmp_path), "--device", "cpu"]
    one_line(capsys, main(arguments), "NeelNanda/pile-10k", "network")


def test_damaged_weights_are_one_line(tmp_path, token_file, capsys):
    folder = save_family("gpt2", tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    one_line(capsys, main(command(folder, token_file, tmp_path)), "not a loadable")
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


def test_full_disk_is_one_line_and_the_run_goes_on_later(tmp_path, small_disk, folder, capsys):
    disk = small_disk(2)
    prompts = tmp_path / "many.npy"
    np.save(prompts, np.tile(PROMPTS.tokens, (20, 1)))
    status = main(command(folder, prompts, disk))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 1 and "disk full" in last
    assert list(disk.glob("*.shards/*.npz"))  # what was computed is kept
    subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
    assert main(command(folder, prompts, disk)) == 0


def test_several_devices_share_the_work_to_the_same_bytes(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(results, "SHARD_PAIRS", 2)
    model = load_model(str(folder), "cpu")
    alone = open_store(sweep(model, PROMPTS, "mean", tmp_path / "alone", progress=False))
    users = []
    real = sweep_module._ablate_pairs
    monkeypatch.setattr(sweep_module, "_ablate_pairs", lambda model, *rest: users.append(model) or real(model, *rest))
    shared = open_store(sweep(model, PROMPTS, "mean", tmp_path / "shared", progress=False, more_devices=[torch.device("cpu")] * 2))
    assert len(users) == 6 and len(set(map(id, users))) == 3
    assert shared.identical(alone)


def test_a_worker_that_fails_is_not_hidden_and_finished_shards_stay(tmp_path, model, monkeypatch):
    monkeypatch.setattr(results, "SHARD_PAIRS", 2)
    real = sweep_module._ablate_pairs

    def fail(on, tokens, pairs, *rest):
        if int(pairs[0]) == 6:
            raise UserError("the device is gone")
        return real(on, tokens, pairs, *rest)

    monkeypatch.setattr(sweep_module, "_ablate_pairs", fail)
    with pytest.raises(UserError, match="gone"):
        sweep(model, PROMPTS, "zero", tmp_path, progress=False, more_devices=[torch.device("cpu")])
    assert len(list(tmp_path.glob("*.shards/0*.sha256"))) >= 3


def test_out_of_memory_halves_the_batch_and_loses_nothing(tmp_path, model, monkeypatch):
    wanted = open_store(sweep(model, PROMPTS, "resample", tmp_path / "roomy", progress=False))
    real, sizes = sweep_module.ablate_heads, []

    def cramped(model, tokens, replacement):
        sizes.append(len(tokens))
        if len(tokens) > room:
            raise torch.OutOfMemoryError
        return real(model, tokens, replacement)

    monkeypatch.setattr(sweep_module, "ablate_heads", cramped)
    monkeypatch.setattr(sweep_module, "rows_that_fit", lambda *_: 1000)
    room = 6
    found = open_store(sweep(model, PROMPTS, "resample", tmp_path / "cramped", progress=False))
    assert sizes[0] == N and max(sizes[-1:]) <= room
    for name in VARIABLES:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-5)
    room = 1
    with pytest.raises(UserError, match="too little memory for one pair"):
        sweep(model, PROMPTS, "zero", tmp_path / "nothing", progress=False)


def test_nothing_the_size_of_vocabulary_times_tokens_is_made(tmp_path, model):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        with_vocabulary = 0

        def __torch_dispatch__(self, operation, types, arguments=(), named=None):
            result = operation(*arguments, **(named or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.ndim > 2 and tensor.shape[-1] == VOCAB:
                    self.with_vocabulary = max(self.with_vocabulary, tensor.shape[:-1].numel())
            return result

    prompts = Prompts(random_tokens(30, 30).numpy(), "longer")
    with Largest() as largest:
        sweep(model, prompts, "resample", tmp_path, progress=False)
    assert 0 < largest.with_vocabulary <= 2 * sweep_module.IDENTITY_POSITIONS < prompts.tokens.size


def test_chunks_hold_one_layer(tmp_path, model, monkeypatch):
    import zarr

    monkeypatch.setattr(results, "SHARD_PAIRS", 3)
    monkeypatch.setattr(results, "PROMPTS_IN_CHUNK", 8)
    path = sweep(model, PROMPTS, "zero", tmp_path, progress=False)
    assert zarr.open_array(path / "logit_change", mode="r").chunks == (1, model.n_heads, 8, PROMPTS.tokens.shape[1] - 1)
    found = open_store(path)
    assert found.prompt.values.tolist() == list(range(N)) and found.donor.values.tolist() == [(i + N // 2) % N for i in range(N)]
