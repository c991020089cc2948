"""Finding models by name: what is embedded, local or at a hub that answers, refuses or is not there."""

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

from selfrepair.models.checkpoints import embedded_models, find_model, model_folder
from selfrepair.errors import UserError
from selfrepair.paths import MODELS

FIND = "import sys\nfrom selfrepair.models.checkpoints import find_model\nfrom selfrepair.errors import UserError\n"


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


def found(names, home: Path, endpoint: str, **environment) -> list[str]:
    """What a new process finds for each name, or its message: where the hub is, is read at import."""
    code = FIND + "for name in sys.argv[1:]:\n try: print(find_model(name))\n except UserError as error: print(error)"
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **environment}
    done = subprocess.run([sys.executable, "-c", code, *names], env=os.environ | environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_embedded_and_local_models_are_folders(tmp_path, monkeypatch):
    assert "pocket-gpt2" in embedded_models()
    assert find_model("pocket-gpt2") == str(MODELS / "pocket-gpt2") and model_folder("pocket-gpt2") == MODELS / "pocket-gpt2"
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


def test_the_hub_is_asked_once_and_its_answer_is_said(hub, tmp_path):
    fine, login, forbidden, unknown, broken, twice = found(
        ["who/200", "who/401", "who/403", "who/404", "who/503", "two words"], tmp_path, hub
    )
    assert fine == "who/200"
    assert "log in with 'hf auth login'" in login and login.startswith("who/401: gated") and "log in" in forbidden
    assert unknown == "who/404: no embedded model, no local folder and no model on the Hugging Face hub: check the name"
    assert "answered with error 503" in broken
    assert "no possible id" in twice
    assert Hub.asked == [f"/who/{status}/resolve/main/config.json" for status in (200, 401, 403, 404, 503)]


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
            assert endpoint in line and "path of a local model folder" in line and "--profile pocket, which needs no network" in line
    assert "HF_HUB_OFFLINE is set" in found(["gpt2"], tmp_path, closed, HF_HUB_OFFLINE="1")[0]


def test_a_model_downloaded_before_needs_no_hub(hub, tmp_path):
    model = tmp_path / "hub" / "models--who--404"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc")
    (model / "snapshots" / "abc").mkdir(parents=True)
    (model / "snapshots" / "abc" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert found(["who/404"], tmp_path, hub) == ["who/404"] == found(["who/404"], tmp_path, hub, HF_HUB_OFFLINE="1")
    assert Hub.asked == []


def test_nothing_heavy_is_imported():
    heavy = ("torch", "transformers", "transformer_lens", "huggingface_hub")
    code = FIND + f"find_model('pocket-gpt2'); print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
