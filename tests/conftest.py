import contextlib
import functools
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

pytest_plugins = ["pytester"]

# No test may reach the network: the embedded models and locally made checkpoints must be enough.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Every annotated shape and type of the library is checked while the tests run: before it is imported
# anywhere.
install_import_hook("selfrepair", "typechecker.typechecker")


ROOT = Path(__file__).resolve().parents[1]

#: Marks of tests that are not in the quick loop; each says what its test protects.
KINDS = ("slow", "slurm", "gpu", "after_run")


def pytest_collection_modifyitems(items):
    """Every test gets exactly one mark, ``fast`` unless it has another; files of slow tests come first.

    ``fast`` are tests of models of three families; the others are ``slow``.
    """
    from families import ALL_FAMILIES, QUICK_FAMILIES

    for item in items:
        marks = [mark for kind in KINDS for mark in item.iter_markers(kind)]
        if len({mark.name for mark in marks}) > 1:
            raise pytest.UsageError(f"{item.nodeid} has several marks of {', '.join(KINDS)}")
        if any(len(mark.args) != 1 for mark in marks):
            raise pytest.UsageError(f"{item.nodeid}: its mark must say what it protects: slow('...')")
    # What takes long first: else one process is left with it while the others have nothing to do.
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    others = set(ALL_FAMILIES) - set(QUICK_FAMILIES)
    for item in items:
        if not any(map(item.get_closest_marker, KINDS)):
            given = item.callspec.params.values() if hasattr(item, "callspec") else ()
            of_another = any(isinstance(value, str) and value in others for value in given)
            item.add_marker(pytest.mark.slow("it holds for every family") if of_another else "fast")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")
    if (
        item.get_closest_marker("after_run")
        and not (ROOT / "results" / "pocket" / "done" / "page.done").exists()
    ):
        pytest.skip("needs a run: ./run_all.sh")


@pytest.fixture
def small_disk(tmp_path):
    """``small_disk(megabytes)``: the folder of a file system of that size."""
    mounted = []

    def mount(megabytes):
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a small file system can be mounted by root only")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """While a file's tests run, what can be made again is kept in a folder of theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELFREPAIR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def loaded_families(tmp_path_factory):
    import reference
    import torch
    from families import load_family
    from transformers import AutoModelForCausalLM

    @functools.cache
    def load(name, dtype=torch.float32):
        folder = tmp_path_factory.mktemp(name)
        model = load_family(name, folder, dtype)
        hf = AutoModelForCausalLM.from_pretrained(
            folder / name, dtype=torch.float64
        )  # not eager attention, which computes in float32
        hf = reference.in_float64(hf.eval())
        return model, hf, state_of(model.hf), state_of(hf)

    return load


@pytest.fixture(scope="module")
def family(loaded_families):
    """(model, the same in Hugging Face float64) by family and dtype, loaded once; no test may leave them
    changed."""
    used = {}

    def load(*which):
        used[which] = loaded_families(*which)
        return used[which][:2]

    yield load
    for which, (model, hf, *states) in used.items():
        for module, before in zip((model.hf, hf), states, strict=True):
            after = state_of(module)
            changed = {what: (before.get(what), after.get(what)) for what in before.keys() | after.keys()}
            changed = {what: values for what, values in changed.items() if values[0] != values[1]}
            assert not changed, f"{which}: left changed for other tests"


def state_of(hf):
    """Hash of weights and buffers, and the hooks and swapped ``forward`` of every module."""
    import torch

    weights = {
        f"{name}, weights": (tensor.data_ptr(), hash(tensor.flatten().view(torch.uint8).numpy().tobytes()))
        for name, tensor in hf.state_dict().items()
    }
    modules = {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
        for name, m in hf.named_modules()
    }
    return weights | modules


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small GPT-2 on the disk, for files of tests that have no other."""
    from families import save_family

    return save_family("gpt2", tmp_path_factory.mktemp("family") / "tiny-gpt2")


@pytest.fixture(scope="module")
def model(folder):
    """The same, loaded."""
    from selfrepair.models.loading import load_model

    return load_model(str(folder), "cpu")


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    """Prompts for it, in a file."""
    import numpy as np
    from tasks import TOKENS

    path = tmp_path_factory.mktemp("tokens") / "ids.npy"
    np.save(path, TOKENS)
    return path


@pytest.fixture(params=(False, True), ids=("plain", "fast"))
def path(request):
    """``path(model)``: the model by the engine's plain path, then in another test by its fast one."""
    from selfrepair.engine.fast import fast_path

    with contextlib.ExitStack() as until_the_end:
        yield lambda model: until_the_end.enter_context(fast_path(model, on=request.param))
