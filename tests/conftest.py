import functools
import os
import subprocess

import pytest
from jaxtyping import install_import_hook

# No test may reach the network: the embedded models and locally made checkpoints must be enough.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Every annotated shape and type of the library is checked while the tests run: before it is imported anywhere.
install_import_hook("selfrepair", "typechecker.typechecker")


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
def family(tmp_path_factory):
    """(model, the same in Hugging Face float64) by family and dtype, loaded once."""
    import reference
    import torch
    from families import load_family
    from transformers import AutoModelForCausalLM

    @functools.cache
    def load(name, dtype=torch.float32):
        folder = tmp_path_factory.mktemp(name)
        model = load_family(name, folder, dtype)
        hf = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64)  # not eager attention, which computes in float32
        return model, reference.in_float64(hf.eval())

    return load
