"""Loading models and naming their parts: embedded names, local folders and hub ids, by one path."""

from __future__ import annotations

import copy
import hashlib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from selfrepair.models.checkpoints import embedded_models, find_model
from selfrepair.models.devices import precision, resolve_device
from selfrepair.errors import UserError
from selfrepair.engine.fast.linear_maps import use_fast_kernels
from selfrepair.models.architectures import check_architecture, check_supported, is_parallel


@dataclass(frozen=True)
class Model:
    """A causal language model whose parts are named, ready for ablation.

    ``bridge`` is TransformerLens' view of it. ``hf`` is a twin without hooks that shares every
    weight: the modules below are the twin's, so that running them costs nothing extra. ``first_maps``
    has, by layer, the norms that read the residual stream, each with all linear maps that read the norm.
    ``source`` is what :func:`load_model` was given.
    """

    name: str
    source: str
    bridge: TransformerBridge
    hf: PreTrainedModel
    blocks: list[nn.Module]
    attentions: list[nn.Module]
    output_projections: list[nn.Module]
    mlp_output_projections: list[nn.Module]
    first_maps: list[list[tuple[nn.Module, list[nn.Module]]]]
    final_norm: nn.Module
    value_biases: list[Float[Tensor, "head d_head"]]
    n_heads: int
    parallel: bool

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @property
    def precision(self) -> str:
        """What its products are computed in: a name of :data:`selfrepair.choices.PRECISIONS`."""
        return precision(self.device, self.dtype)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self.bridge.tokenizer

    @property
    def context_length(self) -> int:
        return self.hf.config.max_position_embeddings

    @property
    def W_U(self) -> Float[Tensor, "d_vocab d_model"]:
        """Unembedding, one row per token."""
        return self.hf.get_output_embeddings().weight

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"] | None:
        return getattr(self.hf.get_output_embeddings(), "bias", None)

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """Output projection of each head of ``layer``; a head writes ``z_h @ W_O[h]``."""
        projection = self.output_projections[layer]
        weight = projection.weight if isinstance(projection, Conv1D) else projection.weight.T
        return weight.unflatten(0, (self.n_heads, -1))

    def W_out(self, layer: int) -> Float[Tensor, "neuron d_model"]:
        """Output projection of the MLP of ``layer``; neuron ``n`` writes ``act_n W_out[n]``."""
        projection = self.mlp_output_projections[layer]
        return projection.weight if isinstance(projection, Conv1D) else projection.weight.T

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of every weight's name and bytes."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.hf.state_dict().items()):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def on(self, device: torch.device) -> Model:
        """The same model once more, on another device."""
        return load_model(self.source, device, self.dtype)


def load_model(name: str, device: str | torch.device = "auto", dtype: torch.dtype = torch.float32) -> Model:
    """Loads an embedded model, a local folder or a hub id through ``TransformerBridge``.

    Raises:
        UserError: it cannot be found, read or reached, or breaks the definitions (see :mod:`selfrepair.models.architectures`).
    """
    device = resolve_device(str(device))
    where = find_model(name)
    with _unloadable_is_said(name, where):
        config = PretrainedConfig.get_config_dict(where)[0]
        check_architecture(config.get("model_type") and str(config["model_type"]), name)
        check_supported(AutoConfig.from_pretrained(where), name)
        hf = _load_weights(name, where, device, dtype)
        bridge = TransformerBridge.boot_transformers(where, hf_model=hf, device=device, dtype=dtype)
    if bridge.cfg.n_heads != hf.config.num_attention_heads:
        raise UserError(f"{name}: its config.json gives both {hf.config.num_attention_heads} and {bridge.cfg.n_heads} heads")
    return name_parts(name, bridge)


@contextmanager
def _unloadable_is_said(name: str, where: str) -> Iterator[None]:
    """Turns what the libraries raise while they read a checkpoint into one line, and keeps their warnings back."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and TransformerLens raise every type for files that are no good
        raise UserError(_why_not_loaded(name, where, error)) from error


def _load_weights(name: str, where: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The weights, read straight to ``device`` in ``dtype``; attention is eager, as TransformerLens' hooks need it.

    Raises:
        UserError: the checkpoint lacks weights, which would be random, or its weights are not those of its
            configuration, or not finite.
    """
    hf, report = AutoModelForCausalLM.from_pretrained(
        where,
        dtype=dtype,
        device_map={"": device},
        attn_implementation="eager",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below
    )
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{name}: {len(missing)} weights are missing from this checkpoint, the first is {missing[0]}: download it again")
    for weight, found, wanted in sorted(report["mismatched_keys"]):
        raise UserError(f"{name}: {weight} has shape {list(found)}, by its config.json it should be {list(wanted)}: download it again")
    for weight in sorted(report["unexpected_keys"]):
        layer = re.search(r"\.(\d+)\.", weight)
        if layer and int(layer[1]) >= hf.config.num_hidden_layers:
            raise UserError(f"{name}: holds {weight}, but has {hf.config.num_hidden_layers} layers by its config.json: download it again")
    for weight, values in hf.named_parameters():
        if not values.isfinite().all():
            raise UserError(f"{name}: {weight} is not finite: the checkpoint is damaged, or {dtype} is too narrow for it")
    return hf


def name_parts(source: str, bridge: TransformerBridge) -> Model:
    """The :class:`Model` of a booted bridge."""
    original = bridge.original_model.eval()
    twins: dict[int, nn.Module] = {}
    hf = _unhooked(original, twins)
    hf.config = copy.deepcopy(original.config)
    if hf._supports_sdpa:
        hf.config._attn_implementation = "sdpa"
    for module in hf.modules():
        if getattr(module, "config", None) is original.config:
            module.config = hf.config

    use_fast_kernels(hf)

    def twin(component: nn.Module) -> nn.Module:
        return twins[id(component.original_component)]

    n_heads = bridge.cfg.n_heads
    biases = []
    for block in bridge.blocks:
        bias = block.attn.b_V
        if bias is None:
            bias = torch.zeros(n_heads, bridge.cfg.d_head, device=hf.device, dtype=hf.dtype)
        biases.append(bias.detach().repeat_interleave(n_heads // bias.shape[0], dim=0))
    return Model(
        name=Path(source).name if Path(source).is_dir() else source,
        source=source,
        bridge=bridge,
        hf=hf,
        blocks=[twin(block) for block in bridge.blocks],
        attentions=[twin(block.attn) for block in bridge.blocks],
        output_projections=[twin(block.attn.o) for block in bridge.blocks],
        mlp_output_projections=[twin(block.mlp.out) for block in bridge.blocks],
        first_maps=[[(twin(norm), [twin(part) for part in maps]) for norm, maps in _first_maps(block)] for block in bridge.blocks],
        final_norm=twin(bridge.ln_final),
        value_biases=biases,
        n_heads=n_heads,
        parallel=is_parallel(hf.config),
    )


def _first_maps(block: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """The norms of a block and the linear maps behind each; a parallel block may have one norm for all."""
    attention, mlp = block.attn.submodules, block.mlp.submodules
    to_attention = [attention["qkv"]] if "qkv" in attention else [attention[part] for part in ("q", "k", "v")]
    to_mlp = [mlp[part] for part in ("in", "gate") if part in mlp]
    if "ln2" in block.submodules:
        return [(block.ln1, to_attention), (block.ln2, to_mlp)]
    return [(block.ln1, to_attention + to_mlp)]


def _unhooked(module: nn.Module, twins: dict[int, nn.Module]) -> nn.Module:
    """A twin of the module tree with TransformerLens' wrappers taken off; weights and buffers are shared."""
    while isinstance(module, GeneralizedComponent):
        module = module.original_component
    if id(module) not in twins:
        twin = copy.copy(module)
        twin.__dict__.pop("forward", None)
        twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
        twin._modules = {name: child if child is None else _unhooked(child, twins) for name, child in module._modules.items()}
        twins[id(module)] = twin
    return twins[id(module)]


def load_hf(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The Hugging Face causal language model and tokenizer of an embedded name, local folder or hub id.

    Raises:
        UserError: it cannot be found, read or reached.
    """
    where = find_model(name)
    with _unloadable_is_said(name, where):
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = _load_weights(name, where, device, dtype)
    if tokenizer.bos_token_id is None:
        tokenizer.bos_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _why_not_loaded(name: str, where: str, error: Exception) -> str:
    said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if Path(where).is_dir():
        return f"{name}: not a loadable causal language model ({said})"
    return (
        f"{name}: the Hugging Face hub did not give all of it ({said}): check the network, or give the path "
        f"of a local model folder; the embedded models ({', '.join(embedded_models())}) and --profile pocket need no network"
    )
