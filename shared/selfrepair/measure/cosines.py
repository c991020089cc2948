"""Do heads write alike? Cosines between what every two heads of a model write at the same token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfrepair.engine.batches import prompts_that_fit
from selfrepair.engine.reading import Reading
from selfrepair.measure.measurement import Inputs, Measurement, Settings
from selfrepair.measure.pairs import pair_shards, prompts_of_shard, tokens_of
from selfrepair.models.devices import on_device

if TYPE_CHECKING:
    from selfrepair.models.loading import Model

COSINE_BYTES = 1 << 28


class Cosines(Measurement):
    """Cosines between outputs of heads (value bias moved out), signed, means over a prompt's tokens.

    ``layers [layer, other_layer, prompt]``: mean over pairs of heads, a head with itself left out.
    ``heads_sum [shard, any_head, other_head]``: sums over the shard's prompts; in order of layer, then head.
    """

    name: ClassVar[str] = "cosines"
    uses: ClassVar[tuple[str, ...]] = ("dtype",)

    def shards(self, settings: Settings) -> Sequence[int]:
        return pair_shards(settings)

    def compute(self, model: Model, settings: Settings, inputs: Inputs, shard: int) -> xr.Dataset:
        prompts = prompts_of_shard(inputs, shard)
        tokens = on_device(tokens_of(model, inputs, prompts), model.device)
        n_heads = model.n_layers * model.n_heads
        total = torch.zeros(n_heads, n_heads, dtype=torch.float64, device=model.device)
        layers = []
        for batch in tokens.split(prompts_that_fit(model, tokens.shape[1])):
            reading = Reading(model, batch)
            for prompt in range(len(batch)):
                cosine = _mean_cosines(reading, prompt)
                total += cosine
                layers.append(_between_layers(cosine, model.n_layers, model.n_heads))
        return xr.Dataset(
            {
                "heads_sum": (("shard", "any_head", "other_head"), total[None].cpu().numpy()),
                "layers": (("layer", "other_layer", "prompt"), torch.stack(layers, dim=-1).cpu().numpy()),
            },
            {"prompt": prompts},
        )


MEASUREMENT = Cosines()


@torch.no_grad()
def _mean_cosines(reading: Reading, prompt: int) -> Float[Tensor, "any_head any_head"]:
    """Of all heads, mean over one prompt's tokens, summed in float64."""
    model = reading.model
    n_positions = reading.clean.final_residual.shape[1] - 1
    at_once = max(1, COSINE_BYTES // (4 * model.n_layers * model.n_heads * model.hf.config.hidden_size))
    total = torch.zeros(2 * (model.n_layers * model.n_heads,), dtype=torch.float64, device=model.device)
    for positions in torch.arange(n_positions, device=model.device).split(at_once):
        outputs = [_outputs(reading, layer, prompt, positions) for layer in range(model.n_layers)]
        units = nn.functional.normalize(torch.cat(outputs, dim=1), dim=-1)
        total += torch.einsum("khd,kgd->hg", units, units)
    return total / n_positions


def _outputs(
    reading: Reading, layer: int, prompt: int, positions: Int[Tensor, " k"]
) -> Float[Tensor, "k head d_model"]:
    model, wide = reading.model, reading.direction.dtype
    own = reading.clean.z[layer][prompt, positions].to(wide) - model.value_biases[layer].to(wide)
    return torch.einsum("khe,hed->khd", own, model.W_O(layer).to(wide))


def _between_layers(
    cosine: Float[Tensor, "any_head any_head"], n_layers: int, n_heads: int
) -> Float[Tensor, "layer layer"]:
    """Means over pairs of different heads."""
    pairs = 1 - torch.eye(len(cosine), dtype=cosine.dtype, device=cosine.device)
    shape = (n_layers, n_heads, n_layers, n_heads)
    total, count = (values.reshape(shape).sum((1, 3)) for values in (cosine * pairs, pairs))
    return total / count.clamp_min(1)
