"""The commit that a manifest names is that of this repository, and of no other that it lies in."""

import os
import subprocess

import pytest

from selfrepair.store import manifest


def git(folder, *arguments):
    names = [f"GIT_{who}_{what}" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-c", "init.defaultBranch=main", "-C", str(folder), *arguments]
    done = subprocess.run(
        command, env=environment | dict.fromkeys(names, "nobody"), capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit, which stands in for this one."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "two words"
    (folder / "unpacked").mkdir(parents=True)
    for file in ("README.md", "unpacked/README.md"):
        (folder / file).write_text("once\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "One")
    monkeypatch.setattr(manifest, "REPOSITORY", folder)
    return folder


def test_a_checkout_has_its_commit_and_a_plus_where_files_differ(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    assert manifest._commit() == commit
    (checkout / "results").mkdir()
    assert manifest._commit() == commit
    (checkout / "README.md").write_text("twice\n")
    assert manifest._commit() == f"{commit}+"


def test_a_copy_inside_another_repository_has_no_commit(checkout, monkeypatch):
    """As a tarball that is unpacked there."""
    monkeypatch.setattr(manifest, "REPOSITORY", checkout / "unpacked")
    assert manifest._commit() is None


def test_without_git_there_is_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", str(checkout))
    assert manifest._commit() is None
