import pytest
import yaml

from selfrepair.errors import UserError
from selfrepair.models import embedded_models
from selfrepair.paths import PROFILES
from selfrepair.profiles import load_profile
from selfrepair.study import Study

GOOD = {"models": ["pocket-gpt2"], "ablations": ["zero"], "n_prompts": 4}


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_profiles_are_valid(path):
    assert load_profile(path.stem).models


def test_pocket_profile_runs_on_every_embedded_model():
    assert sorted(load_profile("pocket").models) == embedded_models()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": 4}, "unknown"),
        ({"models": []}, "models"),
        ({"models": "gpt2"}, "models"),
        ({"ablations": ["swap"]}, "ablations"),
        ({"n_prompts": 5}, "even"),
        ({"n_prompts": "4"}, "even"),
        ({"prompt_len": 1}, "prompt_len"),
        ({"fraction": 0}, "fraction"),
        ({"dataset": 3}, "dataset"),
    ],
)
def test_bad_profiles_are_one_line(tmp_path, changes, said):
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes))
    with pytest.raises(UserError, match=said) as error:
        load_profile(path)
    assert "\n" not in str(error.value)


def test_missing_key_and_file(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("models: [a]\n")
    with pytest.raises(UserError, match="missing ablations"):
        load_profile(path)
    path.write_text("a: [")
    with pytest.raises(UserError, match="not YAML"):
        load_profile(path)
    with pytest.raises(UserError, match=r"there are .*pocket"):
        load_profile("nowhere")


def test_study_replaces_what_the_reader_changed(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    study = Study.of(str(path))
    assert study.profile.models == ["pocket-gpt2"] and study.out_dir.parts[-2:] == ("results", "mine")
    changed = Study.of(str(path), model="gpt2", n_prompts=6, ablation="mean", out_dir=str(tmp_path)).profile
    assert (changed.models, changed.n_prompts, changed.ablations) == (["gpt2"], 6, ["mean"])
