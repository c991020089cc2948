"""Finding models by name and telling them apart: embedded, local or at a hub that answers or does not."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from selfrepair import models
from selfrepair.errors import UserError
from selfrepair.models.checkpoints import (
    checkpoints,
    embedded_models,
    find_model,
    model_folder,
    model_identity,
    read_config,
    short_name,
)
from selfrepair.paths import MODELS

FIND = """
import sys
from selfrepair.errors import UserError
from selfrepair.models.checkpoints import find_model
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers for a model named after what it answers: ``who/404`` with 404."""

    asked: list[str] = []  # noqa: RUF012

    def do_HEAD(self):
        self.asked.append(self.path)
        self.send_response(int(self.path.split("/")[2]))
        self.send_header("ETag", "1")
        self.send_header("Content-Length", "2")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    Hub.asked.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def save_hub_model(home: Path, model_name: str, commit: str) -> None:
    """Leaves a model's configuration in the cache below ``home``, as if it had been downloaded before."""
    model = home / "hub" / f"models--{model_name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    (model / "snapshots" / commit).mkdir(parents=True)
    (model / "snapshots" / commit / "config.json").write_text(json.dumps({"model_type": "gpt2"}))


def found(names, home: Path, endpoint: str, **environment) -> list[str]:
    """What a new process finds for each name, or its message: where the hub is, is read at import."""
    code = (
        FIND
        + "for name in sys.argv[1:]:\n try: print(find_model(name))\n except UserError as error: print(error)"
    )
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_embedded_and_local_models_are_folders(tmp_path, monkeypatch):
    assert "pocket-gpt2" in embedded_models()
    assert (
        find_model("pocket-gpt2") == str(MODELS / "pocket-gpt2")
        and model_folder("pocket-gpt2") == MODELS / "pocket-gpt2"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"mine: no config\.json"):
        find_model("mine")
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert find_model("mine") == "mine" and model_folder("mine") == Path("mine")
    for path in ("./yours", "/no/such", "~/models", "a/b/c"):
        with pytest.raises(UserError, match="no such folder"):
            find_model(path)
    assert model_folder("gpt2") is None and model_folder("EleutherAI/pythia-70m") is None


def test_a_file_in_the_place_of_a_folder_is_called_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").touch()
    for name in ("model.safetensors", str(tmp_path / "model.safetensors")):
        with pytest.raises(UserError, match=f"^{name}: a file, not a model's folder"):
            find_model(name)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_who_gave_a_folder_is_not_told_to_download_it(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"its config\.json .*: check the files of its folder$"):
        read_config(str(tmp_path))


def test_the_hub_is_asked_once_and_its_answer_is_said(hub, tmp_path):
    fine, login, forbidden, unknown, broken, twice = found(
        ["who/200", "who/401", "who/403", "who/404", "who/503", "two words"], tmp_path, hub
    )
    assert fine == "who/200"
    assert (
        "log in with 'hf auth login'" in login
        and login.startswith("who/401: gated")
        and "log in" in forbidden
    )
    assert unknown.startswith(
        "who/404: no embedded model, no local folder and no model on the Hugging Face hub: check the name"
    )
    assert "answered with error 503" in broken
    assert "no possible id" in twice
    assert Hub.asked == [f"/who/{status}/resolve/main/config.json" for status in (200, 401, 403, 404, 503)]


@pytest.mark.parametrize(
    ("name", "meant"), [("pocket-gtp2", "pocket-gpt2"), ("pocket-pythia-smal", "pocket-pythia-small")]
)
def test_a_misspelt_name_is_told_from_the_embedded_ones(name, meant):
    with pytest.raises(UserError, match=f"did you mean {meant}[?]") as error:
        find_model(name)
    assert all(embedded in str(error.value) for embedded in embedded_models())
    assert "--" not in str(error.value)
    with pytest.raises(UserError) as unlike:
        find_model("gpt2")
    assert "did you mean" not in str(unlike.value) and meant in str(unlike.value)


@pytest.mark.slow("without a network, a hub's model is one line soon")
def test_an_unreachable_hub_is_one_line_within_five_seconds(tmp_path):
    with socket.socket() as free:  # a port where nobody listens
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    with socket.create_server(("127.0.0.1", 0)) as silent:  # one where nobody answers
        for endpoint in (closed, f"http://127.0.0.1:{silent.getsockname()[1]}"):
            start = time.monotonic()
            (line,) = found(["gpt2"], tmp_path, endpoint)
            assert time.monotonic() - start < 5
            assert line.startswith("gpt2: wanted from the Hugging Face hub, which was not reachable")
            assert (
                endpoint in line
                and "path of a local model folder" in line
                and "embedded models, which need no network, are pocket-gpt2" in line
            )
    assert "HF_HUB_OFFLINE is set" in found(["gpt2"], tmp_path, closed, HF_HUB_OFFLINE="1")[0]


def test_a_model_downloaded_before_needs_no_hub(hub, tmp_path):
    save_hub_model(tmp_path, "who/404", "abc")
    assert (
        found(["who/404"], tmp_path, hub)
        == ["who/404"]
        == found(["who/404"], tmp_path, hub, HF_HUB_OFFLINE="1")
    )
    assert Hub.asked == []


def test_nothing_heavy_is_imported():
    heavy = ("torch", "transformers", "transformer_lens", "huggingface_hub")
    code = (
        FIND
        + "import selfrepair.models.support\nfrom selfrepair.models import check_supported, embedded_models\n"
    )
    code += f"find_model('pocket-gpt2'); print([name for name in {heavy} if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_the_package_hands_on_what_it_names():
    assert models.__all__ == ["Model", "check_supported", "embedded_models", "load_hf", "load_model"]
    assert {getattr(models, name).__name__ for name in models.__all__} == set(models.__all__)


# --- names and identities of models -----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A folder with the files of a model, whose contents are of no matter here."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md", "metrics.json"):
        (folder / name).write_text("{}")
    return folder


def test_a_short_name_does_not_depend_on_how_a_folder_is_given(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "link").symlink_to(folder)
    assert {short_name(path) for path in (str(folder), "mine", "./mine", "mine/", "link/../mine")} == {"mine"}
    assert short_name("link") == "link"
    monkeypatch.chdir(folder)
    assert short_name(".") == "mine"


def test_short_names_of_embedded_and_hub_models_are_their_names():
    assert short_name("pocket-gpt2") == short_name(str(MODELS / "pocket-gpt2")) == "pocket-gpt2"
    assert short_name("EleutherAI/pythia-70m") == "EleutherAI/pythia-70m" != short_name("other/pythia-70m")


@pytest.mark.parametrize(
    "name",
    (
        "config.json",
        "model.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "spiece.model",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
    ),
)
def test_another_file_of_a_model_is_another_identity(folder, name):
    before = model_identity(str(folder))
    (folder / name).write_text("[1]")
    assert model_identity(str(folder)) != before


def test_what_does_not_change_numbers_does_not_change_the_identity(folder, tmp_path, monkeypatch):
    before = model_identity(str(folder))
    for name in ("README.md", "metrics.json", "train.log", ".gitattributes"):
        (folder / name).write_text("something else")
    (folder / "tokenizer_files").mkdir()
    (folder / "model.safetensors").touch()
    assert model_identity(str(folder)) == before
    monkeypatch.chdir(tmp_path)
    assert model_identity("mine") == before == model_identity(str(folder.rename(tmp_path / "yours")))


def test_weights_that_moved_to_another_file_are_another_identity(folder):
    before = model_identity(str(folder))
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert model_identity(str(folder)) != before


def test_models_without_files_have_no_identity(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        model_identity(str(tmp_path / "none"))
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        model_identity("who/knows")


def test_a_hub_model_is_its_commit(tmp_path):
    save_hub_model(tmp_path, "who/is", "0123abc")
    code = "from selfrepair.models.checkpoints import model_identity, read_config\n"
    code += "print(model_identity('who/is'), read_config('who/is'))"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "0123abc {'model_type': 'gpt2'}\n"


def test_what_lies_beside_checkpoints_of_training_is_none(folder):
    """A copy that a file manager made, or one that was never finished."""
    (folder / "metrics.json").write_text('{"steps": 48, "config": {"gazetteer_seed": 0}}')
    for name in ("step-000048", "step-000004", "step-000048 (copy)", "step-000012.unfinished", "step-"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    assert [saved.step for saved in checkpoints(str(folder))] == [4, 48, 48]
