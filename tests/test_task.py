"""Tasks: shards computed once and merged in order, kills, damage, changed inputs, and several devices."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr
from families import save_family
from tasks import NO_MODEL, TOKENS, Made, heads_task, register, wanted_settings

from selfrepair.errors import UserError
from selfrepair.measure import heads as heads_module
from selfrepair.measure import pairs
from selfrepair.measure import task as task_module
from selfrepair.measure.task import Task
from selfrepair.models.loading import load_model
from selfrepair.store.files import identity
from selfrepair.store.manifest import manifest_of
from selfrepair.store.stores import is_whole, open_store, write_store

N = len(TOKENS)


def flip_a_bit(store):
    chunk = max((file for file in store.rglob("c*") if file.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)


# --- shards and what is merged of them ---------------------------------------------------------------------


def rows(places, **more):
    """Values that say which place they are of."""
    places = np.asarray(places, dtype=int)
    values = {"value": (("prompt", "position"), np.stack([places * 10, places * 10 + 1], axis=1))}
    return xr.Dataset({**values, **more}, {"prompt": places}, {"corpus": "made"})


def of_one(measurement, folder, monkeypatch, **wanted):
    register(monkeypatch, {"made": measurement})
    return Task("made", "none", {"seed": 0, **wanted}, folder)


PLACES = {
    "one after the other": [[0, 1, 2], [3, 4], [5]],
    "pairs of halves": [[0, 1, 4, 5], [2, 3, 6, 7]],
    "every other": [[1, 3, 5], [0, 2, 4]],
    "backwards": [[4, 5], [2, 3], [0, 1]],
    "mixed up in a shard": [[5, 1, 0], [4, 2, 3]],
    "with gaps": [[10, 11], [3], [7, 99]],
    "with empty ones": [[], [2, 0], [], [1], []],
    "nothing at all": [[], []],
}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_parts_are_in_order_whatever_the_shards_hold(tmp_path, monkeypatch, places):
    numbers = [16 * i for i in range(len(places))]

    def compute(shard):
        place = numbers.index(shard)
        total = ("shard", "layer"), np.full((1, 2), shard)
        return rows(
            places[place], total=total, same=("layer", [3.0, 4.0]), count=("shard", [len(places[place])])
        )

    task = of_one(Made(compute, numbers), tmp_path, monkeypatch)
    merged = open_store(task.merge([NO_MODEL]))
    in_order = sorted(itertools.chain(*places))
    assert merged.prompt.values.tolist() == in_order
    assert merged.value.values.tolist() == [[10 * place, 10 * place + 1] for place in in_order]
    assert merged.total[:, 0].values.tolist() == numbers and merged.same.values.tolist() == [3, 4]
    assert merged["count"].values.tolist() == [len(place) for place in places]
    for shard in numbers:
        mine, again = task.of_shard(merged, shard), task.computed_again(NO_MODEL, shard)
        for name in again.variables:
            assert mine[name].identical(again[name]) or np.array_equal(mine[name], again[name]), name
        assert mine.sizes["shard"] == 1


def test_without_an_order_parts_follow_the_shards(tmp_path, monkeypatch):
    measurement = Made(lambda shard: xr.Dataset({"x": ("prompt", np.full(2, shard))}), [5, 3, 9])
    merged = open_store(of_one(measurement, tmp_path, monkeypatch).merge([NO_MODEL]))
    assert merged.x.values.tolist() == [5, 5, 3, 3, 9, 9] and merged.made_in_shard.values.tolist() == [
        5,
        5,
        3,
        3,
        9,
        9,
    ]


@pytest.mark.parametrize("with_rows", [False, True])
def test_what_should_be_the_same_in_all_shards_is(tmp_path, monkeypatch, with_rows):
    def compute(shard):
        same = {"same": ("layer", [0.0, float(shard == 2)])}
        return rows([shard], **same) if with_rows else xr.Dataset(same)

    task = of_one(Made(compute, [0, 1, 2]), tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="same"):
        task.merge([NO_MODEL])
    assert not task.is_done()


def test_totals_alone_and_no_shards_values_alone(tmp_path, monkeypatch):
    totals = of_one(
        Made(lambda shard: xr.Dataset({"t": ("shard", [shard])}), [4, 2]), tmp_path / "a", monkeypatch
    )
    assert open_store(totals.merge([NO_MODEL])).t.values.tolist() == [4, 2]
    once = of_one(
        Made(lambda shard: xr.Dataset({"x": ((), 3)}, attrs={"text": ["a"]}), [0]),
        tmp_path / "b",
        monkeypatch,
    )
    found = open_store(once.merge([NO_MODEL]))
    assert int(found.x) == 3 and found.attrs["text"] == ["a"]


def test_attributes_say_what_made_the_numbers_and_the_manifest_repeats_them(tmp_path, monkeypatch):
    task = of_one(Made(lambda shard: rows([shard]), [0, 1]), tmp_path, monkeypatch, seed=3)
    attributes = open_store(task.merge([NO_MODEL])).attrs
    wanted = {
        "measurement": "made",
        "model": "none",
        "dtype": "float32",
        "seed": 3,
        "corpus": "made",
        "inputs": {},
    }
    assert {name: attributes[name] for name in wanted} == wanted
    assert attributes["code"] == "code of selfrepair.measure.made" and "seconds" not in attributes
    noted = json.loads(manifest_of(task.path).read_text())
    assert noted["source"] == "none"
    assert {name: noted[name] for name in attributes if name not in ("format", "sha256")} == {
        name: value for name, value in attributes.items() if name not in ("format", "sha256")
    }


def test_no_more_than_some_shards_are_read_at_a_time(tmp_path, monkeypatch):
    task = of_one(Made(lambda shard: rows(np.arange(100) + 100 * shard), range(6)), tmp_path, monkeypatch)
    opened = []
    real = task_module.open_store
    monkeypatch.setattr(task_module, "open_store", lambda path: opened.append(real(path)) or opened[-1])
    task.merge([NO_MODEL])
    assert len(opened) > 12 and not any(data.variables["value"]._in_memory for data in opened)


def test_unknown_shards_are_refused(tmp_path, monkeypatch):
    task = of_one(Made(lambda shard: rows([shard]), [0, 16]), tmp_path, monkeypatch)
    with pytest.raises(UserError, match="has no shard 8; its shards are 0, 16"):
        task.compute([NO_MODEL], [0, 8])
    assert task.measurement.computed == []


# --- nothing twice, and everything again that is not whole -------------------------------------------------


def test_a_store_is_made_once_and_shards_that_are_there_are_taken(tmp_path, monkeypatch):
    task = of_one(Made(lambda shard: rows([shard]), range(5)), tmp_path, monkeypatch)
    assert not task.is_done()
    task.compute([NO_MODEL], [3])
    task.compute([NO_MODEL], [3, 1])
    assert task.measurement.computed == [3, 1] and not task.is_done()
    path = task.merge([NO_MODEL])
    assert sorted(task.measurement.computed) == list(range(5)) and task.is_done()
    assert task.merge([NO_MODEL]) == path
    task.compute([NO_MODEL], [2])
    assert len(task.measurement.computed) == 5
    assert {entry.suffix for entry in tmp_path.iterdir()} <= {".zarr", ".json", ".lock"}


def test_damaged_and_half_written_shards_are_made_again(tmp_path, monkeypatch):
    measurement = Made(lambda shard: rows(np.arange(9) + 9 * shard), range(5))
    whole = open_store(of_one(measurement, tmp_path / "whole", monkeypatch).merge([NO_MODEL])).load()
    task = of_one(measurement, tmp_path, monkeypatch)
    task.compute([NO_MODEL], range(5))
    flip_a_bit(task._shard_path(1))
    shutil.rmtree(task._shard_path(2))
    os.rename(task._shard_path(3), task.shard_folder / ".unfinished-000003.zarr")
    (task._shard_path(4) / "zarr.json").write_text("")
    measurement.computed.clear()
    again = open_store(task.merge([NO_MODEL]))
    assert measurement.computed == [1, 2, 3, 4] and again.identical(whole)
    assert not task.shard_folder.exists()


def test_a_damaged_store_is_made_again_and_left_shards_are_removed(tmp_path, monkeypatch):
    task = of_one(Made(lambda shard: rows([shard]), range(2)), tmp_path, monkeypatch)
    whole = open_store(task.merge([NO_MODEL])).load()
    flip_a_bit(task.path)
    assert not task.is_done()
    assert open_store(task.merge([NO_MODEL])).identical(whole) and task.measurement.computed == [0, 1, 0, 1]
    task.shard_folder.mkdir()  # of a run that was killed just before it would have removed them
    task.merge([NO_MODEL])
    assert not task.shard_folder.exists() and len(task.measurement.computed) == 4


MANIFESTS = {
    "missing": lambda path: path.unlink(),
    "damaged": lambda path: path.write_text("{"),
    "of another seed": lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": 7})),
    "of another store": lambda path: path.write_text(
        json.dumps(json.loads(path.read_text()) | {"sha256": "0" * 64})
    ),
    "of nothing": lambda path: path.write_text("{}"),
}


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_store_whose_manifest_is_not_its_own_is_made_again(tmp_path, monkeypatch, manifest):
    task = of_one(Made(lambda shard: rows([shard]), range(2)), tmp_path, monkeypatch)
    whole = open_store(task.merge([NO_MODEL])).load()
    MANIFESTS[manifest](manifest_of(task.path))
    assert not task.is_done()
    assert open_store(task.merge([NO_MODEL])).identical(whole) and task.measurement.computed == [0, 1, 0, 1]
    assert (
        task.is_done() and json.loads(manifest_of(task.path).read_text())["sha256"] == whole.attrs["sha256"]
    )


def test_other_inputs_make_what_is_made_of_them_again(tmp_path, monkeypatch):
    made_of, content = [], {"value": 1}

    class OfAnother(Made):
        def compute(self, model, settings, inputs, shard):
            made_of.append(int(inputs["first"].x))
            return rows([shard])

    first = Made(lambda shard: xr.Dataset({"x": ((), content["value"])}), [0])
    register(monkeypatch, {"first": first, "second": OfAnother(None, [0, 1, 2], ("first",))})

    def second():
        return Task("second", "none", {"seed": 0}, tmp_path)

    second().compute([NO_MODEL], [0, 1])
    content["value"] = 2
    shutil.rmtree(second().needed["first"].path)
    assert not second().is_done()
    second().merge([NO_MODEL])
    assert made_of == [1, 1, 2, 2, 2] and second().is_done()
    shutil.rmtree(second().needed["first"].path)
    assert not second().is_done()
    second().merge([NO_MODEL])  # the same again: what was made of it is kept
    assert made_of == [1, 1, 2, 2, 2] and len(first.computed) == 3 and second().is_done()
    content["value"] = 3
    shutil.rmtree(second().needed["first"].path)
    second().merge([NO_MODEL])
    assert made_of == [1, 1, 2, 2, 2, 3, 3, 3]
    assert open_store(second().path).attrs["inputs_sha256"] == {
        "first": open_store(second().needed["first"].path).attrs["sha256"]
    }


def test_two_at_once_compute_each_shard_once(tmp_path, monkeypatch):
    def compute(shard):
        time.sleep(0.02)
        return rows([shard])

    measurement = Made(compute, range(12))
    tasks = [of_one(measurement, tmp_path, monkeypatch) for _ in range(4)]
    work = [lambda: tasks[0].merge([NO_MODEL]), lambda: tasks[1].merge([NO_MODEL])]
    work += [
        lambda: tasks[2].compute([NO_MODEL], range(12)),
        lambda: tasks[3].compute([NO_MODEL], range(11, -1, -1)),
    ]
    failures = []

    def run(one):
        try:
            one()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=[one]) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and sorted(measurement.computed) == list(range(12))
    assert tasks[0].is_done() and not tasks[0].shard_folder.exists()


def test_the_manifest_counts_the_seconds_of_every_run_that_computed_shards(tmp_path, monkeypatch):
    clock = itertools.count(step=7.0)  # seven seconds go by whenever somebody looks: a shard takes as long
    monkeypatch.setattr(task_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    task = of_one(Made(lambda shard: rows([shard]), [0, 4, 8]), tmp_path, monkeypatch)
    task.compute([NO_MODEL], [4])
    assert json.loads(manifest_of(task.merge([NO_MODEL])).read_text())["seconds"] == 21


@pytest.mark.slow("several devices give the bytes of one")
def test_several_devices_share_the_work_to_the_same_bytes(tmp_path, folder, token_file, monkeypatch):
    monkeypatch.setattr(pairs, "SHARD_PAIRS", 2)
    models = [load_model(str(folder), "cpu") for _ in range(3)]
    alone = open_store(heads_task(folder, token_file, tmp_path / "alone", ablation="mean").merge(models[:1]))
    users = []
    real = heads_module.ablate_pairs
    monkeypatch.setattr(
        heads_module, "ablate_pairs", lambda on, *rest: users.append(on.hf) or real(on, *rest)
    )
    shared = open_store(heads_task(folder, token_file, tmp_path / "shared", ablation="mean").merge(models))
    assert len(users) == 6 and len(set(map(id, users))) == 3
    assert shared.identical(alone)


def test_a_worker_that_fails_is_not_hidden_and_finished_shards_stay(tmp_path, monkeypatch):
    def compute(shard):
        if shard == 3:
            time.sleep(0.3)
            raise UserError("the device is gone")
        return rows([shard])

    task = of_one(Made(compute, range(6)), tmp_path, monkeypatch)
    with pytest.raises(UserError, match="gone"):
        task.merge([NO_MODEL, SimpleNamespace(name="another", fast=True)])
    assert sum(map(is_whole, task.shard_folder.glob("*.zarr"))) >= 3 and not task.path.exists()


def test_progress_of_several_devices_counts_finished_shards(tmp_path, monkeypatch):
    counted = threading.Event()

    class Bar(task_module.tqdm):
        def update(self, n=1):
            counted.set()
            return super().update(n)

    def compute(shard):
        assert shard == 0 or counted.wait(10)
        return rows([shard])

    monkeypatch.setattr(task_module, "tqdm", Bar)
    of_one(Made(compute, [0, 1]), tmp_path, monkeypatch).compute([NO_MODEL, NO_MODEL], [0, 1])
    assert counted.is_set()


def test_progress_counts_shards(tmp_path, monkeypatch, capsys):
    task = of_one(Made(lambda shard: rows([shard]), range(3)), tmp_path, monkeypatch)
    task.merge([NO_MODEL])
    assert capsys.readouterr().err == ""
    shutil.rmtree(task.path)
    task.merge([NO_MODEL], progress=True)
    assert "none made" in (said := capsys.readouterr().err) and "3/3" in said and "shard" in said


# --- kills -------------------------------------------------------------------------------------------------


def killed(out, folder, tokens, *how):
    """What ``kill_sweep.py`` says of every run."""
    script = Path(__file__).with_name("kill_sweep.py")
    command = [sys.executable, str(script), str(out), str(folder), str(tokens), *how]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow("a killed run loses no more than the shard at work")
def test_killed_while_computing_goes_on_to_the_same_bytes(tmp_path, folder):
    tokens = tmp_path / "many.npy"
    np.save(tokens, np.tile(TOKENS, (5, 1)))
    *dead, last, whole = killed(tmp_path / "out", folder, tokens, "amid", "1", "3", "5")
    assert [run["status"] for run in dead] == [-9, -9, -9]
    assert all(1 <= run["kept"] < run["n_shards"] for run in dead)
    assert dead[0]["kept"] < dead[1]["kept"] < dead[2]["kept"]  # what was whole is kept
    assert last["computed"] == last["n_shards"] - dead[-1]["kept"] and whole["computed"] == whole["n_shards"]
    assert os.path.basename(last["store"]) == os.path.basename(whole["store"])
    assert open_store(last["store"]).identical(open_store(whole["store"]))


@pytest.mark.slow("a run killed at any moment leaves nothing half written and goes on to the same bytes")
def test_killed_around_every_step_on_the_disk(tmp_path, folder):
    tokens, n_shards = tmp_path / "many.npy", 2
    np.save(tokens, np.tile(TOKENS, (2, 1)))
    moments = killed(tmp_path / "out", folder, tokens, "every")
    assert [moment["killed"] for moment in moments] == [True] * (len(moments) - 1) + [False]
    assert len(moments) > 4 * n_shards and {moment["status"] for moment in moments} == {0}
    whole = open_store(moments[-1]["store"])
    for moment in moments:
        assert moment["computed"] == (0 if moment["kept"] == "all" else n_shards - moment["kept"])
        assert os.path.basename(moment["store"]) == os.path.basename(moments[-1]["store"])
        assert open_store(moment["store"]).identical(whole)
    assert {moment["kept"] for moment in moments} == {0, 1, 2, "all"}
    left = {path.suffix for path in tmp_path.glob("out/*/*")}
    assert left <= {".zarr", ".lock", ".json"}


# --- what a name is of -------------------------------------------------------------------------------------


def test_changed_inputs_are_another_store(folder, token_file, tmp_path):
    other_tokens = tmp_path / "other.npy"
    np.save(other_tokens, TOKENS[::-1])
    other_model = save_family("neox-parallel", tmp_path / "tiny-gpt2")
    tasks = [
        heads_task(folder, token_file, tmp_path),
        heads_task(folder, token_file, tmp_path, ablation="resample"),
        heads_task(folder, token_file, tmp_path, dtype="bfloat16"),
        heads_task(folder, token_file, tmp_path, seed=1),
        heads_task(folder, token_file, tmp_path, n_prompts=4),
        heads_task(folder, other_tokens, tmp_path),
        heads_task(other_model, token_file, tmp_path),
    ]
    assert len({task.path for task in tasks}) == len(tasks)
    assert all(task.path.name.startswith("tiny-gpt2-heads-") for task in tasks)
    assert heads_task(folder, token_file, tmp_path).path == tasks[0].path
    assert len({identity(task.determined_by) for task in tasks}) == len(tasks)
    np.save(other_tokens, TOKENS)
    assert heads_task(folder, other_tokens, tmp_path).path != tasks[5].path  # the same file, of other content


@pytest.mark.parametrize("name", ("tokens", "unseen_tokens", "facts"))
def test_a_folder_of_data_is_known_by_what_it_holds(folder, token_file, tmp_path, name):
    """As a text and a token file are: else the numbers of its old text would be shown as those of the new."""
    (tmp_path / "ds").mkdir()
    given = {"tokens": None, "dataset": str(tmp_path / "ds"), "facts": str(tmp_path / "ds"), "n_facts": 4}
    wanted = wanted_settings(token_file) | given
    paths = []
    for text in ("old", "new", "old"):
        (tmp_path / "ds" / "train.jsonl").write_text(json.dumps({"text": text}))
        paths.append(Task(name, str(folder), wanted, tmp_path).path)
    assert paths[0] != paths[1] and paths[0] == paths[2]


def test_a_device_with_too_little_memory_is_one_line_and_the_shards_made_before_stay(tmp_path, monkeypatch):
    room = {0}

    def compute(shard):
        if shard not in room:
            raise torch.OutOfMemoryError
        return rows([shard])

    task = of_one(Made(compute, [0, 1]), tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"^made of none: cpu has too little memory for it; use shorter"):
        task.merge([SimpleNamespace(name="none", fast=True, device="cpu")])
    room.add(1)
    assert open_store(task.merge([NO_MODEL])).prompt.values.tolist() == [0, 1]
    assert task.measurement.computed == [0, 1, 1]


def test_what_a_measurement_does_not_use_leaves_its_name_alone(folder, token_file, tmp_path):
    base = heads_task(folder, token_file, tmp_path)
    assert heads_task(folder, token_file, tmp_path, fraction=0.5, head=[0, 1]).path == base.path
    tokens = [
        Task("tokens", str(folder), heads_wanted, tmp_path).path
        for heads_wanted in (base.settings, base.settings | {"ablation": "mean", "dtype": "float16"})
    ]
    assert tokens[0] == tokens[1] == base.needed["tokens"].path


def test_code_is_a_part_of_the_name(folder, token_file, tmp_path, monkeypatch):
    before = heads_task(folder, token_file, tmp_path)
    monkeypatch.setattr(
        task_module, "code_version", lambda *modules: "changed" if modules[0].endswith("tokens") else "same"
    )
    tokens_changed = heads_task(folder, token_file, tmp_path)
    assert (
        before.path != tokens_changed.path
        and before.needed["tokens"].path != tokens_changed.needed["tokens"].path
    )
    monkeypatch.setattr(task_module, "code_version", lambda *modules: "same")
    assert heads_task(folder, token_file, tmp_path).path != tokens_changed.path  # by the name of its input


def test_weights_hash_sees_every_weight(model, folder):
    twin = load_model(str(folder), "cpu")
    assert twin.weights_sha256 == model.weights_sha256
    other = load_model(str(folder), "cpu")
    with torch.no_grad():
        other.final_norm.bias[3] += 1e-3
    assert other.weights_sha256 != model.weights_sha256


def test_every_task_says_what_the_model_is(tmp_path, model, folder, token_file):
    task = heads_task(folder, token_file, tmp_path, seed=3)
    attributes = open_store(task.merge([model])).attrs
    wanted = {
        "model": "tiny-gpt2",
        "architecture": "gpt2",
        "parallel": False,
        "n_layers": 3,
        "n_heads": 4,
        "dtype": "float32",
    }
    wanted |= {
        "ablation": "zero",
        "seed": 3,
        "n_prompts": N,
        "prompt_len": 12,
        "weights_sha256": model.weights_sha256,
    }
    assert {name: attributes[name] for name in wanted} == wanted
    assert attributes["corpus"] == open_store(task.needed["tokens"].path).attrs["corpus"]


def test_a_store_of_another_format_is_measured_again(tmp_path, monkeypatch):
    task = of_one(Made(lambda shard: rows([shard]), [0]), tmp_path, monkeypatch)
    write_store([rows([0])], task.path)
    (task.path / "zarr.json").write_text(
        (task.path / "zarr.json").read_text().replace('"format": 4', '"format": 3')
    )
    assert not task.is_done() and task.merge([NO_MODEL]) and task.is_done()


def test_another_version_of_the_library_makes_another_store(folder, token_file, tmp_path, monkeypatch):
    before = heads_task(folder, token_file, tmp_path).path
    monkeypatch.setattr(task_module, "__version__", "0.0.1")
    assert heads_task(folder, token_file, tmp_path).path != before
