"""Finding and loading models: embedded names, local folders and hub ids, by one path."""

from __future__ import annotations

import copy
import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from selfrepair.devices import resolve_device
from selfrepair.errors import UserError
from selfrepair.kernels import use_fast_kernels
from selfrepair.paths import MODELS
from selfrepair.support import check_supported


def embedded_models() -> list[str]:
    """Names of the models that ship with the repository."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.json"))


def find_model(name: str) -> str:
    """What to give ``from_pretrained``: the folder of an embedded or local model, else the hub id itself.

    Raises:
        UserError: ``name`` is a path but no folder with a ``config.json``.
    """
    if name in embedded_models():
        return str(MODELS / name)
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name}: no config.json in this folder, so it is no Hugging Face model")
        return str(path)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such folder")
    return name


@dataclass(frozen=True)
class Model:
    """A causal language model whose parts are named, ready for ablation.

    ``bridge`` is TransformerLens' view of it. ``hf`` is a twin without hooks that shares every
    weight: the modules below are the twin's, so that running them costs nothing extra.
    """

    name: str
    bridge: TransformerBridge
    hf: PreTrainedModel
    blocks: list[nn.Module]
    attentions: list[nn.Module]
    output_projections: list[nn.Module]
    mlp_output_projections: list[nn.Module]
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

    def weights_hash(self) -> str:
        """SHA-256 of every weight's name and bytes."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.hf.state_dict().items()):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


def load_model(name: str, device: str | torch.device = "auto", dtype: torch.dtype = torch.float32) -> Model:
    """Loads an embedded model, a local folder or a hub id through ``TransformerBridge``.

    Raises:
        UserError: it cannot be found, read or reached, or breaks the definitions (see :mod:`selfrepair.support`).
    """
    device = resolve_device(str(device))
    where = find_model(name)
    try:
        config = AutoConfig.from_pretrained(where)
        check_supported(config, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bridge = TransformerBridge.boot_transformers(where, device=device, dtype=dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(_why_not_loaded(name, where, error)) from error
    return name_parts(Path(where).name if Path(where).is_dir() else name, bridge)


def name_parts(name: str, bridge: TransformerBridge) -> Model:
    """The :class:`Model` of a booted bridge."""
    original = bridge.original_model.eval()
    twins: dict[int, nn.Module] = {}
    hf = _unhooked(original, twins)
    hf.config = copy.deepcopy(original.config)
    hf.config._attn_implementation = "sdpa"
    for module in hf.modules():
        if getattr(module, "config", None) is original.config:
            module.config = hf.config

    use_fast_kernels(hf)

    def twin(component: nn.Module) -> nn.Module:
        return twins[id(component.original_component)]

    n_heads = bridge.cfg.n_heads
    d_head = original.config.hidden_size // n_heads if bridge.cfg.d_head is None else bridge.cfg.d_head
    biases = []
    for block in bridge.blocks:
        bias = block.attn.b_V
        if bias is None:
            bias = torch.zeros(n_heads, d_head, device=hf.device, dtype=hf.dtype)
        biases.append(bias.detach().repeat_interleave(n_heads // bias.shape[0], dim=0))
    return Model(
        name=name,
        bridge=bridge,
        hf=hf,
        blocks=[twin(block) for block in bridge.blocks],
        attentions=[twin(block.attn) for block in bridge.blocks],
        output_projections=[twin(block.attn.o) for block in bridge.blocks],
        mlp_output_projections=[twin(block.mlp.out) for block in bridge.blocks],
        final_norm=twin(bridge.ln_final),
        value_biases=biases,
        n_heads=n_heads,
        parallel=bool(bridge.cfg.parallel_attn_mlp) and getattr(hf.config, "use_parallel_residual", True),
    )


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
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, attn_implementation="eager")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(_why_not_loaded(name, where, error)) from error
    if tokenizer.bos_token_id is None:
        tokenizer.bos_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def _why_not_loaded(name: str, where: str, error: Exception) -> str:
    if Path(where).is_dir():
        return f"{name}: not a loadable causal language model: {' '.join(str(error).split())[:200]}"
    return (
        f"{name}: no embedded model, no local folder, and the Hugging Face hub gave nothing for it: check the name and the network, "
        f"or give the path of a local model folder; the embedded models ({', '.join(embedded_models())}) and --profile pocket need no network"
    )
