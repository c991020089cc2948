"""``selfrepair.measure_heads``: the numbers of plain passes, for names and for models in memory; its example."""

import re
from pathlib import Path

import jaxtyping
import matplotlib
import numpy as np
import pandas as pd
import pytest
import reference
import torch
from families import FAMILIES, build_family, random_tokens
from transformers import (
    AutoTokenizer,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import selfrepair
from selfrepair.analysis.head_table import heads_table
from selfrepair.errors import UserError
from selfrepair.paths import MODELS, REPOSITORY
from selfrepair.run import own_model
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
    fewer = selfrepair.measure_heads(SMALL, text=text, prompt_len=16, n_prompts=2, fraction=0.1, device="cpu")
    assert fewer.effects.sizes["prompt"] == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"text": "short"}, "^text: gives 0 prompts of 128 tokens"),
        ({"text": ["", " "]}, "^text: holds no text"),
        ({"text": []}, "^text: holds no text"),
        ({"text": "hi there", "prompt_len": 32}, "^text: .*one pair is needed: lower prompt_len or add text"),
        ({"text": "many words " * 99, "prompt_len": 8, "n_prompts": 900}, "lower n_prompts or add text"),
        ({"text": "a\ud800b"}, "^text/.*not UTF-8 text"),
        ({"text": "a", "tokens": [[1, 2], [3, 4]]}, "not both"),
        ({"tokens": [[1, 2], [3, 4], [5, 6]], "n_prompts": 3}, "even number"),
        ({"tokens": [[1, 2], [3, 4]], "n_prompts": 4}, "^tokens: gives 2 prompts of 2 tokens; 4 were asked"),
        ({"tokens": [[1.0, 2.0], [3.0, 4.0]]}, "^tokens: must hold integer token ids"),
        ({"tokens": [1, 2, 3, 4]}, "^tokens: must hold integer token ids"),
        ({"tokens": [[1, -2], [3, 4]]}, "^tokens: holds a negative token id"),
        ({"tokens": [[1, 10**6], [3, 4]]}, "^tokens: .* is outside pocket-pythia-small's vocabulary"),
        (
            {"tokens": np.zeros((0, 8), int)},
            "^tokens: gives 0 prompts of 8 tokens; one pair is needed: add rows",
        ),
        (
            {"tokens": [[1, 2]] * 5, "n_prompts": 8},
            "^tokens: .*8 were asked for: lower n_prompts or add rows",
        ),
        ({"tokens": [[1] * 2000] * 2}, "context"),
        ({"ablation": "none"}, "none"),
        ({"fraction": 0}, "fraction"),
        ({"tokens": [[1, 2, 3], [3, 4, 5]], "fraction": 0.2}, "^fraction 0.2 of 4 tokens is less than one"),
        ({"n_prompts": 3}, "even"),
        ({"n_prompts": 0}, "even"),
    ],
)
def test_bad_requests_are_one_line(settings, said):
    if "tokens" in settings:
        settings = settings | {"tokens": np.array(settings["tokens"])}
    with pytest.raises(UserError, match=said) as error:
        selfrepair.measure_heads(SMALL, device="cpu", **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        {"model": None},
        {"model": ""},
        {"model": 3},
        {"model": np.zeros(2)},
        {"text": Path("README.md")},
        {"text": b"some text"},
        {"text": ["some text", 3]},
        {"tokens": [[1, 2], [3]]},
        {"tokens": np.array([["a", "b"], ["c", "d"]])},
        {"tokenizer": SMALL},
        {"n_prompts": 8.0},
        {"n_prompts": "8"},
        {"n_prompts": True},
        {"prompt_len": "a"},
        {"fraction": "a"},
        {"fraction": np.nan},
        {"ablation": ["zero"]},
        {"device": 0},
    ],
)
def test_an_argument_of_another_type_is_one_line(given, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for readers
    monkeypatch.setattr(own_model, "load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=f"^{next(iter(given))} must be .*, not ") as error:
        selfrepair.measure_heads(**{"model": SMALL, **given})
    assert "\n" not in str(error.value)


def test_a_folder_may_be_given_as_a_path_and_numbers_as_numpys(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a NumPy integer is no int
    amounts = {"n_prompts": np.int64(2), "prompt_len": np.int64(8), "fraction": np.float32(0.5)}
    found = selfrepair.measure_heads(MODELS / SMALL, device="cpu", **amounts)
    assert found.model == SMALL and found.effects.sizes["prompt"] == 2


def test_what_was_given_is_named_and_not_its_temporary_copy():
    hf = build_family("gpt2")
    found = selfrepair.measure_heads(hf, tokens=random_tokens(6), device="cpu")
    assert found.effects.attrs["corpus"] == "tokens"
    with torch.no_grad():
        hf.transformer.h[0].attn.c_proj.weight[0, 0] = torch.nan
    with pytest.raises(
        UserError, match=r"^gpt2 \(in memory\): .*c_proj\.weight is not finite: the weights are damaged"
    ):
        selfrepair.measure_heads(hf, tokens=random_tokens(6), device="cpu")
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=9, d_model=4, d_ff=4, num_layers=1, num_heads=1, d_kv=4)
    )
    with pytest.raises(
        UserError, match=r"^t5 \(in memory\): architecture 't5' is not supported: an encoder-decoder"
    ):
        selfrepair.measure_heads(t5, tokens=random_tokens(6), device="cpu")


def _with_hook(hf):
    hf.transformer.h[1].attn.register_forward_hook(
        lambda module, inputs, outputs: (0 * outputs[0], outputs[1])
    )


def _with_other_activation(hf):
    hf.transformer.h[0].mlp.act = torch.nn.ReLU()


def _with_other_eps(hf):
    hf.transformer.ln_f.eps = 0.5


class Scaled(GPT2LMHeadModel):
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = 1.01 * found.logits
        return found


def _with_other_forward(hf):
    hf.__class__ = Scaled


@pytest.mark.parametrize("change", [_with_hook, _with_other_activation, _with_other_eps, _with_other_forward])
def test_what_only_memory_holds_is_refused(change):
    """The copy on the disk would be measured instead."""
    hf = build_family("gpt2")
    change(hf)
    hf.train()
    with pytest.raises(UserError, match=r"^gpt2 \(in memory\): the model in memory is not the one") as error:
        selfrepair.measure_heads(hf, tokens=random_tokens(6), device="cpu")
    assert "\n" not in str(error.value) and all(module.training for module in hf.modules())


def test_a_model_of_another_head_is_refused():
    """Its weights without the head are those of a language model, and would be measured as one."""
    hf = GPT2ForSequenceClassification(build_family("gpt2").config)
    with pytest.raises(
        UserError, match=r"^gpt2 \(in memory\): .*GPT2ForSequenceClassification.*, no language"
    ):
        selfrepair.measure_heads(hf, tokens=random_tokens(6), device="cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_rounding_is_no_change(dtype):
    hf = build_family("gpt2").to(dtype)
    found = selfrepair.measure_heads(hf, tokens=random_tokens(6), device="cpu")
    assert found.model == "gpt2 (in memory)"


def test_a_model_in_memory_is_called_as_it_was_loaded():
    hf = GPT2LMHeadModel.from_pretrained(MODELS / "pocket-gpt2")
    assert selfrepair.measure_heads(hf, tokens=random_tokens(6), device="cpu").model == "pocket-gpt2"


@pytest.mark.parametrize("family", ["gpt2", "neox-parallel"])
def test_a_folder_without_a_tokenizer_reads_no_text(tmp_path, family):
    """transformers makes a tokenizer of special tokens alone; token ids need none."""
    build_family(family).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer with a vocabulary, .*: save the model's tokenizer in"):
        selfrepair.measure_heads(str(tmp_path), n_prompts=4, prompt_len=8, device="cpu")
    found = selfrepair.measure_heads(str(tmp_path), tokens=random_tokens(6), device="cpu")
    assert found.effects.sizes["prompt"] == 6
    empty = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no tokenizer with a vocabulary"):
        selfrepair.measure_heads(build_family(family), tokenizer=empty, n_prompts=4, device="cpu")


def test_prompts_that_are_their_own_donors_are_said(capsys):
    """Resample ablation changes nothing there; other kinds have no donors."""
    hf, tokens = build_family("gpt2"), random_tokens(6)
    twice = torch.cat([tokens, tokens])
    with pytest.raises(
        UserError, match=r"^tokens: every prompt is the same as its donor \(row i of 12 as row i \+ 6"
    ):
        selfrepair.measure_heads(hf, tokens=twice, device="cpu")
    capsys.readouterr()
    selfrepair.measure_heads(hf, tokens=twice, ablation="zero", device="cpu")
    assert "pairs" not in capsys.readouterr().err
    twice[:4] = random_tokens(4, seed=1)
    found = selfrepair.measure_heads(hf, tokens=twice, device="cpu").effects["self_repair"].values
    assert "tokens: 2 of 6 pairs of prompts are twice the same prompt" in capsys.readouterr().err
    assert (found[:, :, [4, 5, 10, 11]] == 0).all() and (found[:, :, [0, 6]] != 0).any()


def test_the_last_of_an_odd_number_of_rows_is_left_out_and_said(capsys):
    found = selfrepair.measure_heads(build_family("gpt2"), tokens=random_tokens(7), device="cpu")
    assert found.effects.sizes["prompt"] == 6
    said = capsys.readouterr().err
    assert "tokens: its last row is left out" in said and said.endswith("it has 7\n")


def test_resample_ablation_changes_nothing_behind_the_same_first_token():
    """Every prompt begins with BOS, and its donor does; the head's own direct effect is there all the same."""
    tokens = random_tokens(6)
    tokens[:, 0] = 1
    found = selfrepair.measure_heads(build_family("llama"), tokens=tokens, device="cpu").effects
    first = found.isel(position=0)
    for name in ("logit_change", "self_repair"):
        np.testing.assert_allclose(first[name], 0, atol=1e-5)
    assert np.abs(first["direct_effect"]).mean() > 0.01 and np.abs(found["self_repair"]).mean() > 0.01


def test_a_model_in_memory_needs_its_tokenizer_for_text():
    with pytest.raises(UserError, match="needs its tokenizer"):
        selfrepair.measure_heads(build_family("gpt2"), device="cpu")


@pytest.mark.slow("the lines of Python in README and docs run")
def test_the_example_of_the_documentation(tmp_path, monkeypatch, capsys):
    pages = [REPOSITORY / "docs" / "python.md", REPOSITORY / "CONTRIBUTING.md"]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    examples = [code for text in texts for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    assert len(examples) == 4 and len([line for line in examples[0].splitlines() if line]) <= 5
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    names: dict[str, object] = {}
    for example in examples:
        alone: dict[str, object] = {}  # each by itself, anywhere
        exec(example, alone)
        names |= alone
    assert "self_repair" in capsys.readouterr().out
    assert names["effects"].sizes["prompt"] == 4
    in_05 = names["table"].set_index("statistic")["estimate"]
    assert in_05["neighbour-cosine-gap"] == pytest.approx(names["estimate"].value)
    table = names["result"].table
    columns = re.findall(r"^\| (`.*?) \|", texts[0].partition("Columns of")[2], re.MULTILINE)
    named = [name for cell in columns for name in re.findall("`(.*?)`", cell)]
    of_parts = [stem.removesuffix("…") for stem in named if stem.endswith("…")]
    assert {"n_tokens", *named} - {"store", *(stem + "…" for stem in of_parts)} == {
        name for name in table if not name.startswith(tuple(of_parts))
    }
    assert (tmp_path / "self_repair.png").stat().st_size > 10_000
    assert names["mine"].ablation == "mean" and names["mine"].table["layer"].nunique() == 6
    # Nothing lies beyond the picture's edges, whatever the user's settings.
    with matplotlib.rc_context({"figure.constrained_layout.use": False}):
        figure = names["mine"].draw()
    figure.canvas.draw()
    tight = figure.get_tightbbox()
    assert tight.x0 >= 0 and tight.y0 >= 0
    assert tight.x1 <= figure.get_figwidth() and tight.y1 <= figure.get_figheight()
