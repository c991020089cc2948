"""Data sets of a hub that answers or does not, and of folders: which one it is, and its rows."""

import http.server
import os
import subprocess
import sys
import threading

import pytest

from selfrepair.errors import UserError
from selfrepair.models import hub
from selfrepair.text import hub_datasets
from selfrepair.text.corpora import _dataset_documents
from selfrepair.text.facts import counterfact_facts
from selfrepair.text.hub_datasets import dataset_identity


def test_another_file_of_a_data_set_is_another_identity(tmp_path, monkeypatch):
    (tmp_path / "ds" / "data" / ".git").mkdir(parents=True)
    file = tmp_path / "ds" / "data" / "train.jsonl"
    file.write_text('{"text": "old"}')
    identities = [dataset_identity(str(tmp_path / "ds"), "")]
    (tmp_path / "ds" / "data" / ".git" / "index").write_text("no data")
    monkeypatch.chdir(tmp_path)
    assert dataset_identity("ds", "") == identities[0]
    file.write_text('{"text": "new"}')
    identities.append(dataset_identity("ds", ""))
    file.rename(tmp_path / "ds" / "train.jsonl")
    identities.append(dataset_identity("ds", ""))
    assert len(set(identities)) == 3


class DatasetHub(http.server.BaseHTTPRequestHandler):
    """Has the data sets ``who/has`` and, without a README.md, ``who/bare``, at the newest of ``commits``."""

    commits: list[str] = []  # noqa: RUF012

    def do_HEAD(self):
        is_there = self.path.startswith(("/datasets/who/has/", "/datasets/who/bare/"))
        is_there &= not self.path.startswith("/datasets/who/bare/") or self.path.endswith(".gitattributes")
        self.send_response(200 if is_there else 404)
        if not is_there:
            is_bare = self.path.startswith("/datasets/who/bare/")
            self.send_header("X-Error-Code", "EntryNotFound" if is_bare else "RepoNotFound")
        self.send_header("X-Repo-Commit", self.commits[-1])
        self.send_header("ETag", f'"{self.commits[-1]}"')
        self.send_header("Content-Length", "2")
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


def test_a_data_set_of_the_hub_is_its_commit_with_a_network_and_later_without(tmp_path):
    code = "import sys\nfrom selfrepair.errors import UserError\n"
    code += "from selfrepair.text.hub_datasets import dataset_identity\nfor name in sys.argv[1:]:\n"
    code += " try: print(dataset_identity(name, 'do this'))\n except UserError as error: print(error)"
    names = ["who/has", "who/bare", "who/not", "no name"]

    def said(**environment):
        environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), **environment}
        command = [sys.executable, "-c", code, *names]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        return done.stdout.splitlines()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), DatasetHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = f"http://127.0.0.1:{server.server_port}"
    for commit in ("a" * 40, "b" * 40):
        DatasetHub.commits.append(commit)
        has, bare, *refused = said()
        assert has == bare == commit
        assert all("gave nothing for it" in line and line.endswith("do this") for line in refused)
    server.shutdown()
    server.server_close()
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        has, bare, unknown, _ = said(**environment)
        assert has == bare == "b" * 40
        assert unknown.startswith("who/not: wanted from the Hugging Face hub, which was not reachable")


READS = {"corpora": lambda: list(_dataset_documents("a/b")), "facts": lambda: counterfact_facts("a/b")}


@pytest.mark.parametrize("was_downloaded", [False, True])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_hub_that_does_not_answer_is_not_asked_again_and_again(monkeypatch, read, was_downloaded):
    """Its own library tries for half a minute, in a dozen lines."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_status", lambda url: None)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked again"))
    if was_downloaded:
        monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: "kept/0123abc/README.md")
    hub_datasets._commit_of.cache_clear()
    with pytest.raises(UserError, match=r"not reachable \(no answer from https://\S+\): "):
        read()
    hub_datasets._commit_of.cache_clear()


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_data_set_is_read_at_the_commit_that_names_what_is_measured_on_it(monkeypatch, read):
    rewrite = {"prompt": "{} is", "subject": "It", "target_true": {"str": "here"}}
    asked = {}

    def load(name, **options):
        asked.update(options, name=name)
        return [{"text": "It is here.", "requested_rewrite": rewrite}]

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr(hub_datasets, "_commit_of", lambda *_: hub_datasets._Commit("0123abc", ""))
    assert hub_datasets.dataset_identity("a/b", "") == "0123abc"
    read()
    assert (asked["name"], asked["revision"]) == ("a/b", "0123abc")


def test_a_local_data_set_needs_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_status", lambda url: pytest.fail("asked the hub"))
    (tmp_path / "train.jsonl").write_text('{"text": "Once."}')
    assert list(_dataset_documents(str(tmp_path))) == ["Once."]
