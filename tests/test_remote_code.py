"""Code that a model's folder brings along is never run, whatever its user answers."""

import ast
import io
import json
import shutil
import sys

import pytest
import torch
from families import save_family

from selfrepair.cli.main import main
from selfrepair.errors import UserError
from selfrepair.models.loading import load_hf, load_model
from selfrepair.paths import PACKAGE
from selfrepair.run.study import Study

#: Of transformers and TransformerLens: what reads a model's folder, and can run code that it finds there.
LOADERS = {"from_pretrained", "from_config"}
CODE = "open({sprung!r}, 'w').close()\n"


@pytest.fixture(params=["its own model_type", "a known model_type"])
def trapped(request, tmp_path, monkeypatch):
    """A model's folder with code for its configuration, model and tokenizer; its user says yes to all."""
    folder = save_family("gpt2", tmp_path / "tiny")
    (folder / "trap.py").write_text(CODE.format(sprung=str(tmp_path / "sprung")))
    classes = {
        "AutoConfig": "trap.Config",
        "AutoModelForCausalLM": "trap.Model",
        "AutoTokenizer": ["trap.Slow", "trap.Fast"],
    }
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = (
            classes if name == "config.json" else {"AutoTokenizer": ["trap.Slow", "trap.Fast"]}
        )
        if request.param == "its own model_type" and name == "config.json":
            content["model_type"] = "trap"
        (folder / name).write_text(json.dumps(content))
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 20))
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    yield folder
    assert not (tmp_path / "sprung").exists()
    shutil.rmtree(folder)


@pytest.mark.parametrize("trapped", ["its own model_type"], indirect=True)
def test_evaluate_runs_none(trapped, capsys):
    assert main(["evaluate", str(trapped), "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("selfrepair: error: ") and said.count("\n") == 1


CPU = torch.device("cpu")
LOADS = {
    "load_model": lambda name: load_model(name, CPU),
    "load_hf": lambda name: load_hf(name, CPU),
    "tokenizer": lambda name: Study.of(model=name, out_dir="unused").tokenizer(name),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_loading_runs_none(trapped, load):
    """A tokenizer that loads is transformers' own class; a model is refused in one line that says why."""
    known = json.loads((trapped / "config.json").read_text())["model_type"] == "gpt2"
    if load is LOADS["tokenizer"]:
        load(str(trapped))
    else:
        with pytest.raises(UserError, match="by auto_map .* code of its own" if known else "'trap'") as error:
            load(str(trapped))
        assert "\n" not in str(error.value)


def test_every_loader_says_so():
    silent = [
        f"{file.relative_to(PACKAGE)}:{call.lineno}"
        for file in PACKAGE.rglob("[!.]*.py")
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in LOADERS
        if not any(
            word.arg == "trust_remote_code" and ast.unparse(word.value) == "False" for word in call.keywords
        )
    ]
    assert silent == []
