import dataclasses
import math
import shutil

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from selfrepair.choices import PRECISIONS
from selfrepair.errors import UserError
from selfrepair.models.loading import embedded_models
from selfrepair.paths import MODELS, PROFILES
from selfrepair.run import profiles
from selfrepair.run.profiles import Profile, load_profile
from selfrepair.run.study import Study

GOOD = {"models": ["pocket-gpt2"], "ablations": ["zero"], "n_prompts": 4}
OWN = {
    "models": ["a", {"name": "b", "n_prompts": 8, "dtype": "bfloat16"}, {"name": "c"}],
    "ablations": ["zero"],
    "n_prompts": 4,
}
FOUR = ["gpt2", "gpt2-medium", "EleutherAI/pythia-160m", "EleutherAI/pythia-410m"]


def write(folder, text):
    path = folder / "p.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def load(folder, values):
    return load_profile(write(folder, yaml.safe_dump(values)))


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_profiles_are_valid(path):
    assert load_profile(path.stem).models


def test_pocket_profile_runs_on_every_embedded_model():
    assert sorted(load_profile("pocket").models) == embedded_models()


@pytest.mark.parametrize(
    ("name", "models", "at_least"),
    [
        ("gpt2-small", ["gpt2"], 100_000),
        ("paper-small", FOUR, 100_000),
        ("paper", [*FOUR, "EleutherAI/pythia-1b"], 1_000_000),
        ("paper", ["gpt2-large", "huggyllama/llama-7b"], 100_000),
    ],
)
def test_profiles_of_the_paper_measure_as_many_tokens_as_they_say(name, models, at_least):
    profile = load_profile(name)
    assert (
        set(models) <= set(profile.models)
        and profile.dataset == "pile"
        and profile.ablations[0] == "resample"
    )
    for model in models:
        own = profile.of_model(model)
        assert at_least <= own.n_prompts * (own.prompt_len - 1) < 1.01 * at_least
    assert (name == "paper") == (profile.of_model("huggyllama/llama-7b").dtype == "bfloat16")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": 4}, "unknown 'prompts'; known keys are models, ablations"),
        ({"per_model": {}}, "unknown 'per_model'"),
        ({"a\nb": 1, 3: 4}, r"unknown 'a\\nb', 3; known"),
        ({"models": []}, "models must be a list"),
        ({"models": "gpt2"}, "models must be a list"),
        ({"models": {"name": "gpt2"}}, "models must be a list"),
        ({"models": [""]}, "models must be names"),
        ({"models": ["gpt2 "]}, "models must be names"),
        ({"models": [None]}, "models must be names"),
        ({"models": [["a"]]}, "models must be names"),
        ({"models": ["a", "b", "a"]}, "models has 'a' twice"),
        ({"models": ["a", {"name": "a", "n_prompts": 8}]}, "models has 'a' twice"),
        ({"models": [{"n_prompts": 8}]}, "models must be names"),
        ({"models": [{"name": 3}]}, "models must be names"),
        (
            {"models": [{"name": "a", "fraction": 0.5}]},
            "unknown 'fraction'; known keys are name, n_prompts, dtype",
        ),
        ({"models": [{"name": "a", "n_prompts": 7}]}, "n_prompts must be a positive even number, not 7"),
        ({"models": ["b", {"name": "a", "dtype": "int8"}]}, "dtype must be one of .*, not 'int8'"),
        ({"ablations": []}, "ablations must be"),
        ({"ablations": "zero"}, "ablations must be"),
        ({"ablations": ["swap"]}, "ablations must be .*resample, mean, zero, optimal, not"),
        (
            {"models": [{"name": "a", "ablations": ["mean", "zero"]}]},
            "ablations of a model must begin with the profile's, zero, not be mean, zero",
        ),
        ({"models": [{"name": "a", "ablations": ["zero", "swap"]}]}, "ablations must be"),
        ({"donor_draws": -1}, "donor_draws must be a whole number that is not negative, not -1"),
        ({"models": [{"name": "a", "donor_draws": True}]}, "donor_draws must be"),
        ({"ablations": ["zero", "mean", "zero"]}, "ablations must be .*different"),
        ({"ablations": [["zero"]]}, "ablations must be"),
        ({"n_prompts": 5}, "even"),
        ({"n_prompts": 0}, "even"),
        ({"n_prompts": -2}, "even"),
        ({"n_prompts": "4"}, "even"),
        ({"n_prompts": 4.0}, "even"),
        ({"n_prompts": True}, "even"),
        ({"n_prompts": None}, "even"),
        ({"prompt_len": 1}, "prompt_len"),
        ({"prompt_len": True}, "prompt_len"),
        ({"prompt_len": 12.5}, "prompt_len"),
        ({"fraction": 0}, "fraction"),
        ({"fraction": -0.1}, "fraction"),
        ({"fraction": 1.001}, "fraction"),
        ({"fraction": True}, "fraction"),
        ({"fraction": "0.02"}, "fraction"),
        ({"fraction": math.nan}, "fraction"),
        ({"fraction": math.inf}, "fraction"),
        ({"fraction": 1e-9}, "less than one token"),
        ({"fraction": 5e-324, "n_prompts": 10**400}, "less than one token"),
        ({"fraction": 0.02, "n_prompts": 2, "prompt_len": 25}, "fraction 0.02 of 48 tokens is less than one"),
        (
            {"fraction": 0.01, "models": [{"name": "a", "n_prompts": 2}, "b"], "prompt_len": 50},
            "of 98 tokens",
        ),
        ({"dataset": 3}, "dataset"),
        ({"dataset": ""}, "dataset"),
        ({"dtype": "float31"}, "dtype must be one of float64, float32, tf32, bfloat16, float16, not"),
        ({"dtype": ["float32"]}, "dtype"),
        ({"dtype": None}, "dtype"),
        ({"layer_positions": "first"}, "layer_positions must be one of last, all, not 'first'"),
    ],
)
def test_bad_profiles_are_one_line(tmp_path, changes, said):
    with pytest.raises(UserError, match=said) as error:
        load(tmp_path, GOOD | changes)
    assert str(error.value).startswith(f"{tmp_path / 'p.yaml'}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [a]\n", "missing ablations, n_prompts"),
        ("", r"must give models, ablations, n_prompts as .* lines; it may also give prompt_len, fraction,"),
        ("- models", "must give models"),
        ("just\n  words", "must give models"),
        ("a: [", r"not YAML \(line 1: "),
        (yaml.safe_dump(GOOD) + "n_prompts: 8\n", r"not YAML \(line \d: 'n_prompts' is given twice\)"),
        ("models:\n- {name: a, name: b}\n", r"line 2: 'name' is given twice"),
        ("? [a]\n: 1\n", r"not YAML \(line 1: .*unhashable"),
        ("n_prompts: 2001-99-99", r"not YAML \(month"),
        ("a: 1\n---\na: 2\n", "not YAML"),
        ("[" * 5000, "not YAML"),
        ("a: \x07", "not YAML"),
        (b"models: [\xff\xfe]", "not YAML .*utf-8"),
        (b"\xff\xfe" + "a: 1".encode("utf-16-le"), "not YAML .*utf-8"),
    ],
)
def test_files_that_hold_no_profile_are_one_line(tmp_path, text, said):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=said) as error:
        load_profile(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_missing_and_unreadable_files(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"nowhere: no such profile; there are .*paper-small, pocket"):
        load_profile("nowhere")
    with pytest.raises(UserError, match=r"gone\.yaml: no such profile"):
        load_profile(tmp_path / "gone.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(UserError, match=r"folder\.yaml: cannot be read \(Is a directory\)"):
        load_profile(tmp_path / "folder.yaml")
    with pytest.raises(UserError, match=r"cannot be read \(Not a directory\)"):
        load_profile(write(tmp_path, "") / "p.yaml")


TEXT = st.text("ab \n'", max_size=3)
SIMPLE = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXT
    | st.sampled_from(["zero", "float32", "pile", 4, 0.5])
)
WILD = SIMPLE | st.lists(
    SIMPLE
    | st.dictionaries(
        st.sampled_from(["name", "n_prompts", "dtype"]) | TEXT, SIMPLE | st.lists(SIMPLE), max_size=3
    )
)
KEYS = [field.name for field in dataclasses.fields(Profile) if field.name != "per_model"]


@given(values=st.dictionaries(st.sampled_from(KEYS), WILD, max_size=3))
def test_any_values_give_a_valid_profile_or_one_line(tmp_path_factory, values):
    folder = tmp_path_factory.getbasetemp()
    try:
        profile = load(folder, GOOD | values)
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        return
    assert len(set(profile.models)) == len(profile.models) > 0 and set(profile.ablations) <= {
        "resample",
        "mean",
        "zero",
    }
    for model in profile.models:
        own = profile.of_model(model)
        assert (
            type(own.n_prompts) is int and own.n_prompts > 0 and own.n_prompts % 2 == 0 and own.prompt_len > 1
        )
        assert own.fraction <= 1 <= own.fraction * own.n_prompts * (own.prompt_len - 1) * (1 + 1e-12)
        assert own.dtype in PRECISIONS and own.dataset != ""


@given(
    text=st.binary(max_size=60)
    | st.text(max_size=60).map(str.encode)
    | st.text("{}[]:,&*!|>-?'\"#% \n0123456789.-:TZ~<=ab", max_size=60).map(str.encode)
)
def test_any_file_is_one_line(tmp_path_factory, text):
    with pytest.raises(UserError) as error:
        load_profile(write(tmp_path_factory.getbasetemp(), text))
    assert "\n" not in str(error.value)


def test_models_may_have_an_amount_and_precision_of_their_own(tmp_path):
    profile = load(tmp_path, OWN)
    assert profile.models == ["a", "b", "c"] and profile.per_model == {
        "b": {"n_prompts": 8, "dtype": "bfloat16"}
    }
    settings = {model: profile.of_model(model) for model in profile.models}
    assert [own.models for own in settings.values()] == [["a"], ["b"], ["c"]]
    assert [own.n_prompts for own in settings.values()] == [4, 8, 4]
    assert [own.dtype for own in settings.values()] == ["float32", "bfloat16", "float32"]
    assert all(own.per_model == {} and own.of_model(own.models[0]) == own for own in settings.values())
    assert profile.of_model("elsewhere") == dataclasses.replace(settings["a"], models=["elsewhere"])
    assert profile.amount == "4 to 8 prompts" and settings["b"].amount == "8 prompts"


def test_the_readers_changes_go_before_a_models_own(tmp_path):
    changed = load(tmp_path, OWN).changed(n_prompts=6)
    assert [changed.of_model(model).n_prompts for model in changed.models] == [6, 6, 6]
    assert changed.of_model("b").dtype == "bfloat16" and changed.amount == "6 prompts"
    alone = load(tmp_path, OWN).changed(models=["b"])
    assert alone.models == ["b"] and alone.of_model("b").n_prompts == 8 and alone.amount == "8 prompts"


def test_study_replaces_what_the_reader_changed(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    study = Study.of(str(path))
    assert study.profile.models == ["pocket-gpt2"] and study.run_folder.parts[-2:] == ("results", "mine")
    changed = Study.of(str(path), model="gpt2", n_prompts=6, ablation="mean", out_dir=str(tmp_path)).profile
    assert (changed.models, changed.n_prompts, changed.ablations) == (["gpt2"], 6, ["mean"])


def folders(*places):
    for place in places:
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}")


def test_paths_in_a_profile_begin_at_its_folder(tmp_path, monkeypatch):
    """Wherever a command or a notebook works, so that all of a run measures the same models."""
    folders(tmp_path / "my" / "model", tmp_path / "pocket-gpt2")
    (tmp_path / "inner").mkdir()
    models = [
        "my/model",
        {"name": "../one/", "n_prompts": 8},
        "pocket-gpt2",
        "gpt2",
        str(MODELS / "pocket-llama"),
    ]
    folders(tmp_path.parent / "one")
    write(tmp_path, yaml.safe_dump(GOOD | {"models": models}))
    whole = [str(tmp_path / "my" / "model"), str(tmp_path.parent / "one")]
    whole += ["pocket-gpt2", "gpt2", str(MODELS / "pocket-llama")]
    for here, name in (
        (tmp_path, "p.yaml"),
        (tmp_path / "inner", "../p.yaml"),
        (MODELS, tmp_path / "p.yaml"),
    ):
        monkeypatch.chdir(here)
        profile = load_profile(name)
        assert profile.models == whole and profile.of_model(whole[1]).n_prompts == 8
    shutil.rmtree(tmp_path.parent / "one")


def test_paths_in_a_profile_of_the_repository_begin_there(tmp_path, monkeypatch):
    folders(tmp_path / "my" / "model")
    (tmp_path / "profiles").mkdir()
    write(tmp_path / "profiles", yaml.safe_dump(GOOD | {"models": ["my/model"]}))
    monkeypatch.setattr(profiles, "PROFILES", tmp_path / "profiles")
    monkeypatch.setattr(profiles, "REPOSITORY", tmp_path)
    for name in ("p", tmp_path / "profiles" / "p.yaml"):
        assert load_profile(name).models == [str(tmp_path / "my" / "model")]


def test_a_folder_that_lies_elsewhere_is_not_taken_for_a_model_of_the_hub(tmp_path, monkeypatch):
    folders(tmp_path / "here" / "my" / "model")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(
        UserError, match="my/model: is a folder here, but paths in this profile begin at"
    ) as error:
        load(tmp_path, GOOD | {"models": ["my/model"]})
    assert "give its whole path" in str(error.value)


def test_one_folder_by_two_names_is_twice(tmp_path):
    folders(tmp_path / "mine")
    for other in ("./mine", "mine/", str(tmp_path / "mine")):
        with pytest.raises(UserError, match=r"models has .* twice"):
            load(tmp_path, GOOD | {"models": ["mine", other]})
