"""Loading models, by one path for embedded names, local folders and hub ids, with their parts named."""

from __future__ import annotations

import hashlib
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from selfrepair.errors import UserError
from selfrepair.models.architectures import is_parallel
from selfrepair.models.checkpoints import (
    TOKENIZER_FILES,
    embedded_models,
    find_model,
    short_name,
    what_to_mend,
)
from selfrepair.models.devices import precision, resolve_device
from selfrepair.models.parts import NormedMaps, first_maps, unhooked, value_biases, weight_out_in
from selfrepair.models.support import (
    check_architecture,
    check_reads_text,
    check_stock,
    check_supported,
    find_architecture,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

transformers.logging.set_verbosity_error()  # as TransformerLens has it: what matters is checked and said here


@dataclass(frozen=True)
class Model:
    """A causal language model whose parts are named, ready for ablation.

    ``bridge`` is TransformerLens' view of it. ``hf`` is a twin without hooks that shares every weight: the
    modules below are the twin's, so that running them costs nothing extra. Lists have one item a layer;
    ``first_maps`` has a layer's norms that read the residual stream, each with all linear maps that read it.
    ``fast``: it computes by the engine's fast path.
    """

    name: str
    bridge: TransformerBridge
    hf: PreTrainedModel
    blocks: list[nn.Module]
    attentions: list[nn.Module]
    output_projections: list[nn.Module]
    mlp_output_projections: list[nn.Module]
    first_maps: list[list[NormedMaps]]
    final_norm: nn.Module
    value_biases: list[Float[Tensor, "head d_head"]]
    n_heads: int
    parallel: bool
    fast: bool = False

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
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return cast(PreTrainedTokenizerBase, self.bridge.tokenizer)  # nothing loads without one

    @property
    def context_length(self) -> int:
        return self.hf.config.max_position_embeddings

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that is measured; all of it lies within a sliding window, if any."""
        window = getattr(self.hf.config, "sliding_window", None)
        return min(self.context_length, window) if type(window) is int else self.context_length

    @property
    def W_U(self) -> Float[Tensor, "d_vocab d_model"]:
        """Unembedding, one row per token."""
        return self.hf.get_output_embeddings().weight

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"] | None:
        return getattr(self.hf.get_output_embeddings(), "bias", None)

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """Output projection of each head of ``layer``; a head writes ``z_h @ W_O[h]``."""
        return weight_out_in(self.output_projections[layer]).T.unflatten(0, (self.n_heads, -1))

    def W_out(self, layer: int) -> Float[Tensor, "neuron d_model"]:
        """Output projection of the MLP of ``layer``; neuron ``n`` writes ``act_n W_out[n]``."""
        return weight_out_in(self.mlp_output_projections[layer]).T

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of every weight's name and bytes."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.hf.state_dict().items()):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


def load_model(
    model_name: str, device: str | torch.device = "auto", dtype: torch.dtype = torch.float32
) -> Model:
    """Loads an embedded model, a local folder or a hub id through ``TransformerBridge``.

    Raises:
        UserError: it cannot be found, read or reached, or breaks the definitions (see
            :mod:`selfrepair.models.support`).
    """
    from transformer_lens.model_bridge import TransformerBridge  # seconds, which not every command needs

    device = resolve_device(str(device))
    where = find_model(model_name)
    with _unloadable_is_said(model_name, where):
        check_architecture(_raw_config(where), model_name)
        check_supported(AutoConfig.from_pretrained(where, trust_remote_code=False), model_name)
        hf = _load_weights(model_name, where, device, dtype)
        bridge = TransformerBridge.boot_transformers(where, hf_model=hf, device=device, dtype=dtype)
    n_heads = hf.config.num_attention_heads
    if bridge.cfg.n_heads != n_heads:
        raise UserError(f"{model_name}: its config.json gives both {n_heads} and {bridge.cfg.n_heads} heads")
    return name_parts(model_name, bridge)


def _raw_config(where: str) -> dict[str, Any]:
    return PretrainedConfig.get_config_dict(where)[0]


@contextmanager
def _unloadable_is_said(model_name: str, where: str) -> Iterator[None]:
    """Makes one line of what the libraries raise while they read a checkpoint; their warnings are hidden."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:  # the libraries raise every type for files that are no good
        raise UserError(_why_not_loaded(model_name, where, error)) from error


def _load_weights(model_name: str, where: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The weights, read straight to ``device`` in ``dtype``; attention is eager, for TransformerLens' hooks.

    Raises:
        UserError: as :func:`_check_weights`.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        where,
        dtype=dtype,
        device_map={"": device},
        attn_implementation="eager",
        output_loading_info=True,
        trust_remote_code=False,  # else transformers asks, and runs what the folder holds on "yes"
        ignore_mismatched_sizes=True,  # refused below
    )
    hf, report = loaded
    _check_weights(model_name, hf, report)
    return hf


def _check_weights(model_name: str, hf: PreTrainedModel, report: Mapping[str, Iterable]) -> None:
    """Refuses what transformers loads with a warning that nobody sees; ``report`` is its loading info.

    Raises:
        UserError: the checkpoint lacks weights, which would be random, or its weights are not those of its
            configuration, or not finite.
    """
    again = what_to_mend(model_name)
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{model_name}: {len(missing)} weights are missing from this checkpoint, "
            f"the first is {missing[0]}: {again}"
        )
    for weight, found, wanted in sorted(report["mismatched_keys"]):
        raise UserError(
            f"{model_name}: {weight} has shape {list(found)}, "
            f"by its config.json it should be {list(wanted)}: {again}"
        )
    n_layers = hf.config.num_hidden_layers
    for weight in sorted(report["unexpected_keys"]):
        layer = re.search(r"\.(\d+)\.", weight)
        if layer and int(layer[1]) >= n_layers:
            raise UserError(
                f"{model_name}: holds {weight}, but has {n_layers} layers by its config.json: {again}"
            )
    for weight, values in hf.named_parameters():
        if not values.isfinite().all():
            raise UserError(
                f"{model_name}: {weight} is not finite: "
                f"the weights are damaged, or {hf.dtype} is too narrow for them"
            )


def name_parts(model_name: str, bridge: TransformerBridge) -> Model:
    """The :class:`Model` of a booted bridge."""
    hf, twin = unhooked(bridge)
    return Model(
        name=short_name(model_name),
        bridge=bridge,
        hf=hf,
        blocks=[twin(block) for block in bridge.blocks],
        attentions=[twin(block.attn) for block in bridge.blocks],
        output_projections=[twin(block.attn.o) for block in bridge.blocks],
        mlp_output_projections=[twin(block.mlp.out) for block in bridge.blocks],
        first_maps=[
            [NormedMaps(twin(norm), [twin(part) for part in maps]) for norm, maps in first_maps(block)]
            for block in bridge.blocks
        ],
        final_norm=twin(bridge.ln_final),
        value_biases=value_biases(bridge),
        n_heads=bridge.cfg.n_heads,
        parallel=is_parallel(hf.config),
    )


def load_hf(
    model_name: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The Hugging Face causal language model and tokenizer of an embedded name, local folder or hub id.

    Raises:
        UserError: it cannot be found, read or reached, is no causal language model or reads no text.
    """
    where = find_model(model_name)
    with _unloadable_is_said(model_name, where):
        config = _raw_config(where)
        model_type = str(config.get("model_type"))
        if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            find_architecture(model_type, model_name)
        check_stock(config, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], model_name)
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        check_reads_text(tokenizer)
        model = _load_weights(model_name, where, device, dtype)
    if tokenizer.bos_token_id is None:
        tokenizer.bos_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _why_not_loaded(model_name: str, where: str, error: Exception) -> str:
    said = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
    if Path(where).is_dir():
        has_tokenizer = any(file for pattern in TOKENIZER_FILES for file in Path(where).glob(pattern))
        instead = "" if has_tokenizer else "save the model's tokenizer in its folder, which has none, or "
        mend = what_to_mend(model_name)
        return f"{model_name}: not a loadable causal language model ({said}): {instead}{mend}"
    return (
        f"{model_name}: the Hugging Face hub did not give all of it ({said}): check the network, "
        f"or give the path of a local model folder; the embedded models ({', '.join(embedded_models())}) "
        "need no network"
    )
