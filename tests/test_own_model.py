"""``selfrepair.measure_heads``: the numbers of plain passes, for names and for models in memory; its example."""

import re

import matplotlib
import numpy as np
import pandas as pd
import pytest
import reference
import torch
from families import FAMILIES, build_family, random_tokens
from transformers import AutoTokenizer

import selfrepair
from selfrepair.analysis.head_table import heads_table
from selfrepair.errors import UserError
from selfrepair.paths import MODELS, REPOSITORY
from selfrepair.run.study import Study

SMALL = "pocket-pythia-small"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_a_model_in_memory_against_plain_passes(family, ablation):
    hf, tokens = build_family(family), random_tokens(6)
    before = {name: weight.clone() for name, weight in hf.state_dict().items()}
    found = selfrepair.measure_heads(hf, tokens=tokens, ablation=ablation, device="cpu").effects
    assert all(torch.equal(weight, before[name]) for name, weight in hf.state_dict().items())
    plain = reference.in_float64(build_family(family).double().eval())
    for layer, head in ((0, 1), (2, 3)):
        wanted = reference.ablate(plain, tokens, layer, head, ablation)
        for name in ("direct_effect", "logit_change", "self_repair_heads", "self_repair_mlps"):
            here = found[name].values[layer, head]
            np.testing.assert_allclose(here, wanted[name], atol=2e-4, err_msg=name)


@pytest.mark.slow("the five lines of Python give the numbers of a run")
def test_a_name_gives_the_numbers_of_the_suite(tmp_path):
    """More prompts than one shard has, which are merged in order."""
    found = selfrepair.measure_heads(SMALL, n_prompts=40, device="cpu")
    study = Study.of(model=SMALL, device="cpu", out_dir=tmp_path, n_prompts=40, ablation="resample")
    sweep = study.measured("heads")[SMALL]
    pd.testing.assert_frame_equal(found.table, heads_table(sweep), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.effects["token"], sweep["token"])


@pytest.mark.slow("one's own text is measured as the suite's is")
def test_text_is_cut_into_prompts():
    tokenizer = AutoTokenizer.from_pretrained(MODELS / SMALL)
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    found = selfrepair.measure_heads(SMALL, text=[text, "A second document."], prompt_len=16, device="cpu")
    tokens = found.effects["token"].values
    assert len(tokens) % 2 == 0 and (tokens[:, 0] == tokens[0, 0]).all()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    of_the_text = [ids[first : first + 15] for first in range(0, len(ids) - 14, 15)]
    rows = tokens[:, 1:].tolist()
    assert sum(row in of_the_text for row in rows) >= len(rows) - 1
    assert len(rows) >= len(of_the_text) - 1 and rows != of_the_text[: len(rows)]
    fewer = selfrepair.measure_heads(SMALL, text=text, prompt_len=16, n_prompts=2, device="cpu")
    assert fewer.effects.sizes["prompt"] == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"text": "short"}, "^text: gives 0 prompts of 128 tokens"),
        ({"text": ["", " "]}, "^text: holds no text"),
        ({"text": "a", "tokens": [[1, 2], [3, 4]]}, "not both"),
        ({"tokens": [[1, 2], [3, 4], [5, 6]], "n_prompts": 3}, "even number"),
        ({"tokens": [[1, 2], [3, 4]], "n_prompts": 4}, "^tokens: gives 2 prompts of 2 tokens; 4 were asked"),
        ({"tokens": [[1.0, 2.0], [3.0, 4.0]]}, "^tokens: must hold integer token ids"),
        ({"tokens": [1, 2, 3, 4]}, "^tokens: must hold integer token ids"),
        ({"tokens": [[1, -2], [3, 4]]}, "^tokens: holds a negative token id"),
        ({"tokens": [[1, 10**6], [3, 4]]}, "outside pocket-pythia-small's vocabulary"),
        ({"tokens": [[1] * 2000] * 2}, "context"),
        ({"ablation": "none"}, "none"),
        ({"fraction": 0}, "fraction"),
        ({"n_prompts": 3}, "even"),
    ],
)
def test_bad_requests_are_one_line(settings, said):
    if "tokens" in settings:
        settings = settings | {"tokens": np.array(settings["tokens"])}
    with pytest.raises(UserError, match=said) as error:
        selfrepair.measure_heads(SMALL, device="cpu", **settings)
    assert "\n" not in str(error.value)


def test_a_model_in_memory_needs_its_tokenizer_for_text():
    with pytest.raises(UserError, match="needs its tokenizer"):
        selfrepair.measure_heads(build_family("gpt2"), device="cpu")


@pytest.mark.slow("the lines of Python in README and docs run")
def test_the_example_of_the_documentation(tmp_path, monkeypatch, capsys):
    examples = re.findall(
        r"```python\n(.*?)```", (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(examples) == 2 and len([line for line in examples[0].splitlines() if line]) <= 5
    for name in ("shared", "README.md"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    names: dict[str, object] = {}
    for example in examples:
        exec(example, names)
    assert "self_repair" in capsys.readouterr().out
    assert (tmp_path / "self_repair.png").stat().st_size > 10_000
    assert names["mine"].ablation == "mean" and names["mine"].table["layer"].nunique() == 6
    # Nothing lies beyond the picture's edges, whatever the user's settings.
    with matplotlib.rc_context({"figure.constrained_layout.use": False}):
        figure = names["mine"].draw()
    figure.canvas.draw()
    tight = figure.get_tightbbox()
    assert tight.x0 >= 0 and tight.y0 >= 0
    assert tight.x1 <= figure.get_figwidth() and tight.y1 <= figure.get_figheight()
