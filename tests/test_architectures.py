"""What is supported loads as on the hub and equals the reference; the rest is refused before it is read."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys

import pytest
import reference
import torch
import transformers
from families import ALL_FAMILIES, TINY, build_family, random_tokens
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from selfrepair.engine.ablations import find_ablation
from selfrepair.engine.forward import run_clean
from selfrepair.engine.head_ablation import HeadAblations, ablate_heads
from selfrepair.engine.identity_check import check_identity
from selfrepair.engine.sites import HEADS
from selfrepair.errors import UserError
from selfrepair.models.architectures import ARCHITECTURES, CONDITIONS, SUPPORTED
from selfrepair.models.loading import load_model
from selfrepair.models.parts import weight_out_in
from selfrepair.models.support import REFUSALS, check_config, check_supported, check_window, support_table
from selfrepair.paths import MODELS, REPOSITORY

VOCAB = 320
TEXT = (MODELS / "README.md").read_text()
TOKENIZERS = dict.fromkeys(("neox-parallel", "neox-sequential"), "GPTNeoXTokenizer")
TOKENIZERS |= dict.fromkeys(("llama", "llama-gqa", "mistral"), "LlamaTokenizer")
TOKENIZERS |= {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "phi": "CodeGenTokenizer"}
HALF = (
    "gpt2",
    "neox-parallel",
    "neox-sequential",
    "opt",
    "phi",
    "llama",
)  # the hub has these in float16, the others in bfloat16


@functools.cache
def own_tokenizer(family):
    return getattr(transformers, TOKENIZERS.get(family, "GPT2Tokenizer"))().train_new_from_iterator(
        TEXT.splitlines(), VOCAB
    )


@pytest.fixture(scope="module")
def like_hub(tmp_path_factory):
    """Folders of checkpoints in shards of 16-bit weights with a tokenizer of the family's own class."""
    folders = {}

    def save(family):
        if family not in folders:
            folder = folders[family] = tmp_path_factory.mktemp(family)
            model = build_family(family, VOCAB).to(torch.float16 if family in HALF else torch.bfloat16)
            if family == "gpt2":  # whose names of weights lack the prefix of the language model
                model.transformer.save_pretrained(folder, max_shard_size="30KB")
                model.config.architectures = ["GPT2LMHeadModel"]
                model.config.save_pretrained(folder)
            else:
                model.save_pretrained(folder, max_shard_size="30KB")
            own_tokenizer(family).save_pretrained(folder)
        return folders[family]

    return save


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_hub_checkpoint_loads_and_one_head_equals_the_reference(like_hub, family):
    folder = like_hub(family)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 2
    model = load_model(str(folder), device="cpu")
    ids = model.tokenizer.encode(TEXT, add_special_tokens=False)
    assert (
        ids == own_tokenizer(family).encode(TEXT, add_special_tokens=False)
        and len(set(ids)) > 100
        and max(ids) < VOCAB
    )
    assert model.tokenizer.bos_token_id is not None
    tokens = torch.tensor(ids[:60]).view(6, 10)
    check_identity(model, tokens)
    hf = reference.in_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval())
    found = ablate_heads(
        model, tokens, find_ablation("resample").prepare(model, [tokens], HEADS), layers=range(1, 2)
    )
    wanted = reference.ablate(hf, tokens, 1, 2, "resample")
    assert wanted["logit_change"].abs().max() > 0.1
    for field in (field.name for field in dataclasses.fields(HeadAblations)):
        got = getattr(found, field)
        got = got if field == "sigma_clean" else got[0, 2]
        assert (got - wanted[field]).abs().max() <= 1e-4 * max(1, wanted[field].abs().max()), field


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize("family", ("gpt2", "llama-gqa", "qwen3", "phi", "gpt-neo"))
def test_weights_are_of_the_dtype_asked_for_and_rotary_tables_are_not_rounded(like_hub, family, dtype):
    model = load_model(str(like_hub(family)), device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in model.hf.parameters()} == {dtype} == {model.dtype}
    tables = [buffer for name, buffer in model.hf.named_buffers() if "inv_freq" in name]
    assert bool(tables) == (family in ("llama-gqa", "qwen3", "phi"))
    assert {table.dtype for table in tables} <= {torch.float32}
    check_identity(model, random_tokens(2))


@torch.no_grad()
def mlp_follows_attention(hf, tokens):
    """Whether the first MLP's neurons change where the attention of its block writes nothing."""
    neurons = []
    (attention, *_), (mlp, *_) = reference.parts(hf)[1], reference.mlp_projections(hf)
    seen = mlp.register_forward_pre_hook(lambda _, given: neurons.append(given[0]))
    hf(input_ids=tokens)
    silent = attention.register_forward_hook(lambda _, given, output: torch.zeros_like(output))
    hf(input_ids=tokens)
    silent.remove()
    seen.remove()
    return not torch.equal(*neurons)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_parts_are_what_they_are_named(like_hub, family):
    model = load_model(str(like_hub(family)), device="cpu")
    tokens = random_tokens(2)
    assert model.context_length == 32
    assert len(model.W_O(0)) == model.n_heads == 4
    assert model.value_biases[0].shape == model.W_O(0).shape[:2]
    hf = AutoModelForCausalLM.from_pretrained(like_hub(family), dtype=torch.float32)
    assert model.parallel != mlp_follows_attention(hf, tokens)
    for layer, projection in enumerate(reference.mlp_projections(hf)):
        torch.testing.assert_close(
            model.value_biases[layer].flatten(), reference.value_bias(hf, layer), rtol=0, atol=0
        )
        torch.testing.assert_close(model.W_out(layer), reference.out_matrix(projection), rtol=0, atol=0)
    seen = {}
    names = {id(module): name for name, module in model.hf.named_modules()}
    pairs = [(norm, part) for layer in model.first_maps for norm, maps in layer for part in maps]
    for module in {id(module): module for pair in pairs for module in pair}.values():
        module.register_forward_hook(
            lambda module, given, output: seen.__setitem__(id(module), (given[0], output))
        )
    clean = run_clean(model, tokens)
    for norm, part in pairs:
        given, output = seen[id(part)]
        assert given is seen[id(norm)][1], (names[id(norm)], names[id(part)])
        constant = 0 if part.bias is None else part.bias
        torch.testing.assert_close(given @ weight_out_in(part).T + constant, output, rtol=0, atol=1e-5)
    # every linear map of a block is either one of them, or a head's or neuron's way out of it
    ways_out = {id(module) for module in (*model.output_projections, *model.mlp_output_projections)}
    linear = {
        id(module)
        for block in model.blocks
        for module in block.modules()
        if getattr(module, "weight", torch.empty(0)).ndim == 2
    }
    assert linear == {id(part) for _, part in pairs} | ways_out
    for layer, norms in enumerate(model.first_maps):
        read = [seen[id(norm)][0] for norm, _ in norms]
        assert torch.equal(read[0], clean.residuals[layer])
        if len(norms) == 2:
            after_attention = clean.residuals[layer] + clean.attention_outputs[layer]
            wanted = read[0] if model.parallel else after_attention
            torch.testing.assert_close(read[1], wanted.view_as(read[1]), rtol=0, atol=1e-6)
        else:
            assert model.parallel


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_records_say_how_models_are_built(like_hub, family):
    model = load_model(str(like_hub(family)), device="cpu")
    record = SUPPORTED[model.hf.config.model_type]
    assert {record.norms in type(norm).__name__ for layer in model.first_maps for norm, _ in layer} == {True}
    assert {len(layer) == 1 for layer in model.first_maps} == {record.one_norm}
    embeddings = [module for module in model.hf.modules() if isinstance(module, torch.nn.Embedding)]
    assert len(embeddings) == (2 if record.positions == "learned" else 1)  # of positions, too
    assert "rotary" in record.positions or record.positions == "learned"
    assert record.any_heads == hasattr(model.hf.config, "num_key_value_heads")
    assert bool(record.sliding_window) == hasattr(model.hf.config, "sliding_window")


@pytest.mark.parametrize("family", ("gpt2", "neox-parallel", "llama"))
def test_the_twin_without_hooks_shares_every_weight(like_hub, family):
    model = load_model(str(like_hub(family)), device="cpu")
    modules = list(model.hf.modules())
    assert not any(isinstance(module, GeneralizedComponent) or module._forward_hooks for module in modules)
    assert not any("forward" in vars(module) for module in modules)
    original = {weight.data_ptr() for weight in model.bridge.original_model.parameters()}
    assert {weight.data_ptr() for weight in model.hf.parameters()} <= original
    tokens = random_tokens(2)
    with torch.no_grad():
        difference = model.bridge(tokens) - model.hf(tokens).logits
    assert difference.abs().max() < 1e-4


def test_every_supported_architecture_has_a_tiny_model(like_hub):
    found = {family: AutoConfig.from_pretrained(like_hub(family)).model_type for family in ALL_FAMILIES}
    assert found == {family: model_type for family, (model_type, _) in TINY.items()}
    assert set(found.values()) == set(SUPPORTED)
    assert len(SUPPORTED) == len(ARCHITECTURES) and len(TINY) == sum(
        len(record.tiny) for record in ARCHITECTURES
    )


def test_no_architecture_is_refused_twice_or_supported_too():
    refused = [kind for refusal in REFUSALS for kind in refusal.models]
    assert len(set(refused)) == len(refused) and not set(refused) & set(SUPPORTED)


@pytest.mark.parametrize(
    ("kind", "reason"), [(kind, refusal.reason) for refusal in REFUSALS for kind in refusal.models]
)
def test_refused_by_name_from_the_configuration_alone(kind, reason, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were asked for")
    )
    with pytest.raises(UserError) as refused:
        load_model(str(tmp_path), device="cpu")
    assert f"architecture '{kind}' is not supported: {reason}; supported are gpt2" in str(refused.value)
    assert "\n" not in str(refused.value) and kind not in SUPPORTED


@pytest.mark.parametrize(
    "fields", ({"model_type": "bloom"}, {"model_type": "made_up_last_night"}, {"hidden_size": 8})
)
def test_unknown_architectures_are_refused(fields, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="its definitions were not checked"):
        load_model(str(tmp_path), device="cpu")


BREAKING = {
    "do_layer_norm_before": ("opt", False),
    "word_embed_proj_dim": ("opt", 8),
    "_remove_final_layer_norm": ("opt", True),
    "layer_norm_elementwise_affine": ("opt", False),
    "attention_bias": ("gpt_neox", False),
    "qk_layernorm": ("phi", True),
    "add_cross_attention": ("gpt2", True),
    "is_encoder_decoder": ("gpt2", True),
    "final_logit_softcapping": ("llama", 30.0),
    "logits_soft_cap": ("llama", 30.0),
    "logit_scale": ("llama", 0.0625),
    "logits_scaling": ("qwen2", 8.0),
    "residual_multiplier": ("llama", 0.2),
    "num_experts": ("qwen3", 8),
    "num_local_experts": ("mistral", 8),
    "n_routed_experts": ("llama", 8),
    "vision_config": ("mistral", {"hidden_size": 8}),
    "audio_config": ("mistral", {"hidden_size": 8}),
    "quantization_config": ("llama", {"quant_method": "gptq", "bits": 4}),
    "rope_scaling": ("llama", {"rope_type": "dynamic", "factor": 2.0}),
}


def test_every_condition_is_tried():
    conditions = [*CONDITIONS, *(condition for record in ARCHITECTURES for condition in record.conditions)]
    for condition in conditions:
        first = re.match(r"`(\w+)", condition.setting)[1]
        assert ("rope_scaling" if first == "rope_type" else first) in BREAKING


@pytest.mark.parametrize("setting", BREAKING)
def test_settings_that_break_the_definitions_are_refused(setting, tmp_path, monkeypatch):
    kind, value = BREAKING[setting]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, setting: value}))
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were asked for")
    )
    named = "rope_type" if setting == "rope_scaling" else setting
    conditions = (*SUPPORTED[kind].conditions, *CONDITIONS)
    reasons = [condition.reason for condition in conditions if f"`{named}" in condition.setting]
    with pytest.raises(UserError, match="is not supported: with ") as refused:
        load_model(str(tmp_path), device="cpu")
    assert any(reason in str(refused.value) for reason in reasons)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        *((kind, {}) for kind in SUPPORTED),
        (
            "llama",
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "attention_bias": True,
                "mlp_bias": True,
            },
        ),
        (
            "llama",
            {
                "tie_word_embeddings": True,
                "logit_scale": 1.0,
                "final_logit_softcapping": None,
                "head_dim": 16,
            },
        ),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ],
)
def test_settings_that_keep_them_are_not(kind, fields):
    check_supported(AutoConfig.for_model(kind, **fields), kind)


def test_prompts_must_lie_within_the_sliding_window():
    windowed = AutoConfig.for_model("qwen2", use_sliding_window=True, sliding_window=64)
    check_window(windowed, 64, "qwen")
    with pytest.raises(
        UserError, match=r"qwen: its attention looks back 64 tokens .* \(prompt_len\) of 64 tokens or less"
    ):
        check_window(windowed, 65, "qwen")
    for config in (
        AutoConfig.for_model("qwen2", sliding_window=64),
        AutoConfig.for_model("mistral", sliding_window=None),
    ):
        check_window(config, 4096, "all of it")
    check_window(AutoConfig.for_model("gpt2"), 1024, "gpt2")


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"model_type": "mistral", "sliding_window": 64}, True),
        ({"model_type": "mistral", "sliding_window": None}, False),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True}, True),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False}, False),
        ({"model_type": "qwen3", "sliding_window": 64}, False),
        ({"model_type": "llama", "sliding_window": 64}, False),
    ],
)
def test_a_sliding_window_in_force_is_refused_before_anything_is_loaded(config, refused):
    check_config(config, 64, "windowed")
    if refused:
        with pytest.raises(UserError, match=r"^windowed: its attention looks back 64 tokens"):
            check_config(config, 65, "windowed")
    else:
        check_config(config, 65, "windowed")
    windows = getattr(AutoConfig.for_model(**config), "sliding_window", None)  # as it is loaded
    assert config["model_type"] == "llama" or (windows == 64) == refused


@pytest.mark.parametrize("record", ARCHITECTURES, ids=lambda record: record.model_type)
def test_only_the_language_model_of_an_architecture_is_measured(record):
    """As config.json says; older ones do not."""
    assert record.causal_lm == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[record.model_type]
    config = {"model_type": record.model_type}
    for named in ({}, {"architectures": None}, {"architectures": [record.causal_lm]}, {"auto_map": {}}):
        check_config(config | named, 2, "hub/model")
    for named in ("GPT2Model", ["GPT2ForSequenceClassification"], 3):
        with pytest.raises(UserError, match=f"^hub/model: .*{record.causal_lm} would be measured in its"):
            check_config(config | {"architectures": named}, 2, "hub/model")
    with pytest.raises(UserError, match=r"^hub/model: not supported: by auto_map"):
        check_config(config | {"auto_map": {"AutoModelForCausalLM": "own.Model"}}, 2, "hub/model")


def test_missing_weights_are_refused(like_hub, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(like_hub("llama"))
    model.model.save_pretrained(tmp_path)  # all but the unembedding
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(like_hub("llama")).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"1 weights are missing from this checkpoint, the first is lm_head\.weight"
    ):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    "fields",
    ("{", '{"model_type": "llama", "hidden_size": 33}', '{"model_type": "llama", "hidden_size": "wide"}'),
)
def test_a_damaged_configuration_is_one_line(fields, tmp_path):
    (tmp_path / "config.json").write_text(fields)
    with pytest.raises(UserError, match="not a loadable causal language model") as refused:
        load_model(str(tmp_path), device="cpu")
    assert "\n" not in str(refused.value)


PEAK = """
import sys, torch
from selfrepair.models.loading import load_model

def peak():  # of this process only, which getrusage's is not
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

load_model(sys.argv[1], "cpu", torch.bfloat16)
before = peak()
model = load_model(sys.argv[2], "cpu", torch.bfloat16)
assert all(parameter.sum().isfinite() for parameter in model.hf.parameters())
print(peak() - before)
"""


@pytest.mark.slow("loading a model takes the memory of its weights, not twice that")
@pytest.mark.skipif(sys.platform != "linux", reason="a process's peak memory is read from /proc")
def test_host_memory_of_loading_is_the_weights(like_hub, tmp_path):
    shape = dict(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape), dtype=torch.bfloat16)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size="30MB")
    own_tokenizer("llama").save_pretrained(tmp_path)
    command = [sys.executable, "-c", PEAK, str(like_hub("llama")), str(tmp_path)]
    grown = subprocess.run(
        command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True
    )
    assert 0.8 * weights < int(grown.stdout) < 1.3 * weights


def test_table_says_what_is_checked_and_the_readme_has_it():
    table = support_table()
    rows = [row.removeprefix("| ").removesuffix(" |").split(" | ") for row in table.splitlines()[2:]]
    said = {
        kind: supported
        for kinds, _, supported in rows
        if " with " not in kinds
        for kind in re.findall("`(.+?)`", kinds)
    }
    refused = {kind: f"no: {refusal.reason}" for refusal in REFUSALS for kind in refusal.models}
    assert said == {kind: f"yes: {record.blocks}" for kind, record in SUPPORTED.items()} | refused
    families = [
        (f"`{record.model_type}`", condition) for record in ARCHITECTURES for condition in record.conditions
    ]
    for kind, condition in [*families, *(("any", condition) for condition in CONDITIONS)]:
        assert [f"{kind} with {condition.setting}", condition.models, f"no: {condition.reason}"] in rows
    begin, end = "<!-- support table -->", "<!-- end of support table -->"
    page = REPOSITORY / "docs" / "architectures.md"
    assert page.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0].strip() == table
