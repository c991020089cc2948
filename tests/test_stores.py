"""Stores on the disk: labels, checksums, damage, parts in order, and files written whole or not at all."""

import itertools
import os
import shutil
import threading

import numpy as np
import pytest
import xarray as xr
import zarr

from selfrepair.errors import UserError
from selfrepair.store import files, stores
from selfrepair.store.files import identity, remove_unfinished, slug, write_atomically
from selfrepair.store.stores import FormatError, is_whole, kept, open_store, write_store

LAYERS, HEADS, POSITIONS = 3, 4, 11


def prompts_from(first, n, seed=0):
    """A part of some prompts, with what is the same in all parts."""
    rng = np.random.default_rng(seed + first)
    values = {
        "effect": (("layer", "head", "prompt", "position"), rng.normal(size=(LAYERS, HEADS, n, POSITIONS))),
        "sigma": (("prompt", "position"), rng.normal(size=(n, POSITIONS)).astype(np.float32)),
        "width": ((), 32),
        "bias": (("layer", "head"), np.arange(LAYERS * HEADS).reshape(LAYERS, HEADS)),
    }
    coords = {
        "prompt": np.arange(first, first + n),
        "donor": ("prompt", np.arange(n)),
        "position": np.arange(POSITIONS),
        "order": ("layer", [2, 0, 1]),
    }
    return xr.Dataset(values, coords, {"model": "tiny", "settings": {"seed": [0, None, 0.5, "x"]}})


def parts_of(*sizes):
    firsts = itertools.accumulate(sizes[:-1], initial=0)
    return [prompts_from(first, n) for first, n in zip(firsts, sizes, strict=True)]


def joined(parts):
    return xr.concat(parts, "prompt", data_vars="minimal", coords="minimal", compat="equals", join="exact")


def largest_chunk(path, variable="effect"):
    return max(
        (file for file in (path / variable).rglob("c*") if file.is_file()),
        key=lambda file: file.stat().st_size,
    )


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("sizes", [(5,), (3, 3), (1, 64, 2), (70, 70, 1), (20,) * 9], ids=str)
@pytest.mark.parametrize("to_be_merged", [False, True])
def test_what_is_read_is_what_was_written(tmp_path, sizes, to_be_merged):
    parts = parts_of(*sizes)
    write_store(iter(parts), tmp_path / "a.zarr", to_be_merged=to_be_merged)
    found = open_store(tmp_path / "a.zarr")
    assert found.attrs.pop("format") == stores.FORMAT and len(found.attrs.pop("sha256")) == 64
    wanted = joined(parts)
    assert found.identical(wanted)
    assert {name: v.dtype for name, v in found.variables.items()} == {
        name: v.dtype for name, v in wanted.variables.items()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr"]


def test_the_checksum_is_of_what_is_held_not_of_how_it_came(tmp_path):
    whole = joined(parts_of(9, 70))
    for name, parts in (
        ("a", [whole]),
        ("b", parts_of(9, 70)),
        ("c", [whole.isel(prompt=[i]) for i in range(79)]),
    ):
        write_store(parts, tmp_path / f"{name}.zarr")
    write_store([whole], tmp_path / "fast.zarr", to_be_merged=True)
    checksums = {open_store(tmp_path / f"{name}.zarr").attrs["sha256"] for name in ("a", "b", "c", "fast")}
    assert len(checksums) == 1
    changes = [
        whole.assign_attrs(model="other"),
        whole.rename(sigma="scale"),
        whole.assign(sigma=whole.sigma + 1e-6),
        whole.assign(sigma=whole.sigma.assign_attrs(units="logits")),
        whole.assign(sigma=whole.sigma.astype(np.float64)),
        whole.rename(position="place"),
        whole.drop_vars("order"),
    ]
    for changed in changes:
        write_store([changed], tmp_path / "changed.zarr")
        checksums.add(open_store(tmp_path / "changed.zarr").attrs["sha256"])
    assert len(checksums) == 1 + len(changes)


def test_no_prompts_and_no_values_can_be_kept(tmp_path):
    write_store([prompts_from(0, 0)], tmp_path / "empty.zarr")
    found = open_store(tmp_path / "empty.zarr")
    assert found.sizes["prompt"] == 0 and found.effect.shape == (LAYERS, HEADS, 0, POSITIONS)
    write_store([prompts_from(0, 0), prompts_from(0, 3)], tmp_path / "grown.zarr")
    assert open_store(tmp_path / "grown.zarr").effect.equals(prompts_from(0, 3).effect)
    write_store([xr.Dataset(attrs={"model": "tiny"})], tmp_path / "nothing.zarr")
    assert open_store(tmp_path / "nothing.zarr").attrs["model"] == "tiny"


def test_totals_follow_each_other_along_shards(tmp_path):
    parts = [
        *parts_of(4, 4),
        *(xr.Dataset({"total": (("shard", "layer"), np.full((1, LAYERS), n))}) for n in range(3)),
    ]
    write_store(parts, tmp_path / "a.zarr")
    found = open_store(tmp_path / "a.zarr")
    assert found.total.dims == ("shard", "layer") and found.total[:, 0].values.tolist() == [0, 1, 2]
    assert found.sizes["prompt"] == 8 and found.attrs["model"] == "tiny"


def test_what_should_be_the_same_in_all_parts_is(tmp_path):
    parts = parts_of(70, 70)
    for size in (70, 3):
        other = prompts_from(70, size).assign(width=((), 33))
        with pytest.raises(ValueError, match="width"):
            write_store([parts[0].isel(prompt=slice(size)), other], tmp_path / "a.zarr")
    assert not list(tmp_path.iterdir())


def test_chunks_hold_one_layer_and_some_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "PROMPTS_IN_CHUNK", 8)
    write_store(parts_of(6, 6, 6), tmp_path / "a.zarr")
    assert zarr.open_array(tmp_path / "a.zarr" / "effect", mode="r").chunks == (1, HEADS, 8, POSITIONS)
    assert open_store(tmp_path / "a.zarr").equals(joined(parts_of(6, 6, 6)))
    write_store(parts_of(18), tmp_path / "b.zarr", to_be_merged=True)
    assert len(list((tmp_path / "b.zarr" / "effect").rglob("c*"))) == 1


def test_no_more_parts_than_fill_a_chunk_are_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "PROMPTS_IN_CHUNK", 8)
    alive, most = set(), 0

    def parts():
        nonlocal most
        for number, part in enumerate(parts_of(*[4] * 12)):
            alive.add(number)
            most = max(most, len(alive))
            yield part

    real = stores._write_values

    def counted(blocks, *rest):
        real((block for block in blocks if not alive.difference_update(block.prompt.values // 4)), *rest)

    monkeypatch.setattr(stores, "_write_values", counted)
    write_store(parts(), tmp_path / "a.zarr")
    assert most <= 3 and not alive


DAMAGES = {
    "a bit": lambda path: flip_a_bit(largest_chunk(path)),
    "a chunk is gone": lambda path: largest_chunk(path).unlink(),
    "a chunk is cut": lambda path: largest_chunk(path).write_bytes(largest_chunk(path).read_bytes()[:-3]),
    "a variable is gone": lambda path: (path / "sigma" / "zarr.json").unlink(),
    "other attributes": lambda path: zarr.open_group(path).attrs.update({"model": "big"}),
    "other labels": lambda path: zarr.open_array(path / "sigma").attrs.update({"units": "miles"}),
    "no checksums": lambda path: zarr.open_group(path).attrs.put({"format": stores.FORMAT}),
    "no JSON": lambda path: (path / "zarr.json").write_text("{"),
    "no zarr.json": lambda path: (path / "zarr.json").unlink(),
    "one more variable": lambda path: zarr.open_group(path).create_array(
        "more", data=np.zeros(3), dimension_names=["x"]
    ),
}


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed(tmp_path, damage, read_before, monkeypatch):
    path = tmp_path / "a.zarr"
    write_store(parts_of(6, 6), path)
    if read_before:
        assert is_whole(path)
    else:
        monkeypatch.setattr(stores, "_seen_whole", {})
    DAMAGES[damage](path)
    assert not is_whole(path)
    with pytest.raises(UserError, match=r"a\.zarr: damaged.*measure again$"):
        open_store(path)


def test_other_formats_and_no_stores_are_told_from_damage(tmp_path):
    with pytest.raises(UserError, match="no such store"):
        open_store(tmp_path / "none.zarr")
    write_store(parts_of(2), tmp_path / "old.zarr")
    zarr.open_group(tmp_path / "old.zarr").attrs.update({"format": 3})
    with pytest.raises(FormatError, match="format 3"):
        open_store(tmp_path / "old.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="no store"):
        open_store(tmp_path / "folder")


def test_a_store_is_checked_once_unless_a_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.zarr"
    write_store(parts_of(6, 6), path)
    checked = []
    real = stores._checksum
    monkeypatch.setattr(stores, "_checksum", lambda array: checked.append(array.name) or real(array))
    open_store(path)
    assert checked == []  # read back when it was written
    monkeypatch.setattr(stores, "_seen_whole", {})
    for _ in range(3):
        open_store(path)
    assert len(checked) == len(set(checked)) == len(prompts_from(0, 1).variables)
    chunk = largest_chunk(path)
    chunk.write_bytes(chunk.read_bytes())
    open_store(path)
    assert len(checked) == 2 * len(set(checked))


def test_another_file_of_the_same_size_and_time_is_another_state(tmp_path):
    """As a copy puts it there that keeps times."""
    path = tmp_path / "a.zarr"
    write_store(parts_of(6), path)
    before, chunk = stores.state_of(path), largest_chunk(path)
    assert stores.state_of(path) == before
    shutil.copy2(chunk, tmp_path / "other")
    flip_a_bit(tmp_path / "other")
    times = chunk.stat()
    os.utime(tmp_path / "other", ns=(times.st_atime_ns, times.st_mtime_ns))
    (tmp_path / "other").replace(chunk)
    now = chunk.stat()
    assert (now.st_size, now.st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    assert stores.state_of(path) != before


def test_a_store_takes_the_place_of_another_as_a_whole(tmp_path):
    path = tmp_path / "~" / "a.zarr"
    write_store(parts_of(6, 6), path)
    (path.parent / ".unfinished-a.zarr").mkdir()  # of a run that was killed
    (path.parent / ".unfinished-a.zarr" / "zarr.json").write_text("{")
    write_store([xr.Dataset({"other": ((), 1)})], path)
    assert set(open_store(path).variables) == {"other"}

    def breaks_off():
        yield prompts_from(0, 70)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(breaks_off(), path)
    assert set(open_store(path).variables) == {"other"}
    assert [entry.name for entry in path.parent.iterdir()] == ["a.zarr"]


def always(_found):
    return True


def test_kept_is_computed_where_it_is_missing_damaged_or_of_something_else(tmp_path):
    path = tmp_path / "shards" / "000000.zarr"
    computed = []

    def get(number, is_current=always):
        found = kept(
            path, lambda: computed.append(number) or xr.Dataset({"number": ((), number)}), is_current
        )
        return int(found.number)

    assert [get(1), get(2)] == [1, 1]
    next((path / "number" / "c").rglob("*"), path / "number" / "c").write_bytes(b"x")
    assert [get(3), get(4)] == [3, 3]
    assert [get(5, lambda found: int(found.number) == 5), get(6, lambda found: int(found.number) == 5)] == [
        5,
        5,
    ]
    assert computed == [1, 3, 5]


def test_attributes_are_the_same_before_and_after_a_store_was_read(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "_seen_whole", {})
    path = tmp_path / "a.zarr"
    write_store(parts_of(3), path)
    stores._seen_whole.clear()
    first, second = stores.attributes_of(path), stores.attributes_of(path)
    assert first == second == open_store(path).attrs


@pytest.mark.parametrize("when", ["while its files are looked at", "just before it is read"])
def test_a_store_that_another_process_replaces_just_then_is_not_whole(tmp_path, monkeypatch, when):
    path = tmp_path / "a.zarr"
    write_store(parts_of(3), path)
    if when == "just before it is read":
        state = stores.state_of(path)
        monkeypatch.setattr(stores, "state_of", lambda path: [state, shutil.rmtree(path)][0])
    else:
        walk = os.walk
        monkeypatch.setattr(stores.os, "walk", lambda path: [list(walk(path)), shutil.rmtree(path)][0])
    assert stores.attributes_of(path) is None


def test_two_at_once_compute_what_is_kept_once(tmp_path):
    computed, found = [], []
    started, go_on = threading.Event(), threading.Event()

    def compute():
        computed.append(0)
        started.set()
        assert go_on.wait(30)
        return prompts_from(0, 2)

    workers = [
        threading.Thread(target=lambda: found.append(kept(tmp_path / "a.zarr", compute, always)))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    assert started.wait(30)
    go_on.set()
    for worker in workers:
        worker.join()
    assert len(computed) == 1 and all(one.identical(found[0]) for one in found) and len(found) == 4


def test_names_differ_where_any_attribute_does():
    base = {"ablation": "mean", "seed": 0, "inputs": {"tokens": "a"}}
    others = [
        base | change
        for change in ({"ablation": "zero"}, {"seed": 1}, {"inputs": {"tokens": "b"}}, {"more": None})
    ]
    assert len({identity(attributes) for attributes in (base, *others)}) == 5
    assert identity(base) == identity(dict(reversed(base.items()))) and len(identity(base)) == 12


def test_a_hub_models_name_is_one_part_of_a_path():
    assert slug("EleutherAI/pythia-160m") == "EleutherAI--pythia-160m" and slug("a/folder/") == "a--folder"


@pytest.mark.parametrize("name", ["model[1].json", "a*.json"])
def test_what_a_killed_write_left_is_found_whatever_the_file_is_called(tmp_path, name):
    (tmp_path / f".{name}.0123abcd").touch()
    (tmp_path / ".a-b.json.0123abcd").touch()
    remove_unfinished(tmp_path / name)
    assert [entry.name for entry in tmp_path.iterdir()] == [".a-b.json.0123abcd"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.json"
    write_atomically(path, b"one")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"another")
    assert path.read_bytes() == b"one" and list(path.parent.iterdir()) == [path]
    (path.parent / ".file.json.0123abcd").write_bytes(b"of a killed run")
    (path.parent / ".other.json.0123abcd").write_bytes(b"of another file")
    remove_unfinished(path)
    assert sorted(entry.name for entry in path.parent.iterdir()) == [".other.json.0123abcd", "file.json"]
    with pytest.raises(UserError, match="is a folder or a device"):
        write_atomically(tmp_path / "new", b"")
