"""Slow, obvious float64 references: one full forward pass per head, hooked at the output projection.

Nothing here is shared with the library's fast path but the weights.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def parts(hf):
    """(blocks, output projections, final norm) of a Hugging Face model, by its own attribute names."""
    base = hf.base_model
    kind = hf.config.model_type
    if kind == "gpt2":
        return base.h, [b.attn.c_proj for b in base.h], base.ln_f
    if kind == "gpt_neo":
        return base.h, [b.attn.attention.out_proj for b in base.h], base.ln_f
    if kind == "gpt_neox":
        return base.layers, [b.attention.dense for b in base.layers], base.final_layer_norm
    if kind in ("llama", "mistral", "qwen2", "qwen3"):
        return base.layers, [b.self_attn.o_proj for b in base.layers], base.norm
    if kind == "phi":
        return base.layers, [b.self_attn.dense for b in base.layers], base.final_layernorm
    if kind == "opt":
        return (
            base.decoder.layers,
            [b.self_attn.out_proj for b in base.decoder.layers],
            base.decoder.final_layer_norm,
        )
    raise ValueError(kind)


def mlp_projections(hf):
    """The MLPs' output projections, by layer."""
    llama = "mlp.down_proj"
    names = {
        "gpt2": "mlp.c_proj",
        "gpt_neo": "mlp.c_proj",
        "gpt_neox": "mlp.dense_4h_to_h",
        "opt": "fc2",
        "phi": "mlp.fc2",
    }
    names |= {"llama": llama, "mistral": llama, "qwen2": llama, "qwen3": llama}
    return [block.get_submodule(names[hf.config.model_type]) for block in parts(hf)[0]]


def value_bias(hf, layer) -> Tensor:
    """Bias of the values, one entry per input of the output projection."""
    block = parts(hf)[0][layer]
    kind, d, heads = hf.config.model_type, hf.config.hidden_size, hf.config.num_attention_heads
    if kind == "gpt2":
        return block.attn.c_attn.bias[2 * d :]
    if kind == "gpt_neox":
        return block.attention.query_key_value.bias.view(heads, 3, -1)[:, 2].reshape(-1)
    if kind == "opt":
        return block.self_attn.v_proj.bias
    values = block.attn.attention.v_proj if kind == "gpt_neo" else block.self_attn.v_proj
    if values.bias is None:
        return torch.zeros(out_matrix(parts(hf)[1][layer]).shape[0], dtype=hf.dtype)
    groups = heads // hf.config.num_key_value_heads
    return values.bias.view(hf.config.num_key_value_heads, -1).repeat_interleave(groups, 0).reshape(-1)


def out_matrix(projection) -> Tensor:
    """[input, d_model]"""
    return projection.weight if type(projection).__name__ == "Conv1D" else projection.weight.T


@torch.no_grad()
def forward(hf, tokens, patch=None):
    """Full forward pass, what the definitions need of it; ``patch = (layer, head, z_new)`` replaces a z."""
    blocks, projections, norm = parts(hf)
    heads = hf.config.num_attention_heads
    seen = {"z": {}, "attention": {}, "residual": {}}
    handles = []
    for layer, (block, projection) in enumerate(zip(blocks, projections, strict=True)):

        def before(_, args, layer=layer):
            z = args[0].clone()
            width = z.shape[-1] // heads
            if patch is not None and patch[0] == layer:
                z[..., patch[1] * width : (patch[1] + 1) * width] = patch[2]
            seen["z"][layer] = z
            return (z,)

        def after(_, args, output, layer=layer):
            seen["attention"][layer] = output

        def enter(_, args, kwargs, layer=layer):
            seen["residual"][layer] = args[0] if args else kwargs["hidden_states"]

        handles += [
            projection.register_forward_pre_hook(before),
            projection.register_forward_hook(after),
            block.register_forward_pre_hook(enter, with_kwargs=True),
        ]
    handles.append(
        norm.register_forward_pre_hook(lambda _, args: seen["residual"].__setitem__(len(blocks), args[0]))
    )
    try:
        seen["logits"] = hf(input_ids=tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return seen


def centred_correct_logit(logits, tokens):
    centred = logits - logits.mean(-1, keepdim=True)
    return centred[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]


def sigma(hf, residual):
    norm = parts(hf)[2]
    if type(norm).__name__ == "LayerNorm":
        return ((residual - residual.mean(-1, keepdim=True)).pow(2).mean(-1) + norm.eps).sqrt()
    return (residual.pow(2).mean(-1) + norm.variance_epsilon).sqrt()


def read_frozen(hf, written, sigma_clean, tokens):
    """Direct effect of ``written`` [b, k, d]: the norm's formula, σ frozen, onto the centred unembedding."""
    norm = parts(hf)[2]
    if type(norm).__name__ == "LayerNorm":
        written = written - written.mean(-1, keepdim=True)
    normed = norm.weight * written / sigma_clean[..., None]
    logits = normed @ hf.get_output_embeddings().weight.T
    return centred_correct_logit(logits, tokens)


#: Kinds of ablation that :func:`replaced` knows by name: those that learn from nothing but what is ablated.
KINDS = ("resample", "mean", "zero")


def replaced(kind, clean, nothing):
    """What takes the place of ``clean [prompt, position, what]``; ``nothing [what]`` is left if nothing is added.

    ``kind`` is the name of an ablation, or a function from ``clean`` to what takes its place.
    """
    n = len(clean)
    if kind == "resample":
        return torch.stack([clean[(i + n // 2) % n] for i in range(n)])
    if kind == "mean":
        return clean.mean((0, 1)).expand_as(clean)
    if kind == "zero":
        return nothing.expand_as(clean)
    return kind(clean).expand_as(clean)


@torch.no_grad()
def ablate(hf, tokens, layer, head, kind):
    """Every quantity of the definitions for one head, from two full forward passes.

    ``kind`` is as in :func:`replaced`.
    """
    clean = forward(hf, tokens)
    heads = hf.config.num_attention_heads
    width = clean["z"][layer].shape[-1] // heads
    part = slice(head * width, (head + 1) * width)
    z = clean["z"][layer][..., part]
    bias = value_bias(hf, layer)[part]
    new = replaced(kind, z, bias)
    ablated = forward(hf, tokens, (layer, head, new))
    projections = parts(hf)[1]
    last = len(projections)
    s = sigma(hf, clean["residual"][last])
    W_O = out_matrix(projections[layer])[part]

    def effect(written):
        return read_frozen(hf, written, s, tokens)

    def mlp_out(run, i):
        return run["residual"][i + 1] - run["residual"][i] - run["attention"][i]

    direct, ablated_direct = effect((z - bias) @ W_O), effect((new - bias) @ W_O)
    change = centred_correct_logit(ablated["logits"], tokens) - centred_correct_logit(clean["logits"], tokens)
    other_heads = 0
    for i, projection in enumerate(projections):
        W = out_matrix(projection)
        for h in range(heads):
            if (i, h) != (layer, head):
                span = slice(h * width, (h + 1) * width)
                b = value_bias(hf, i)[span]
                other_heads = other_heads + effect((ablated["z"][i][..., span] - b) @ W[span])
                other_heads = other_heads - effect((clean["z"][i][..., span] - b) @ W[span])
    mlps = sum(effect(mlp_out(ablated, i)) - effect(mlp_out(clean, i)) for i in range(last))
    s_ablated = sigma(hf, ablated["residual"][last])
    beta = getattr(parts(hf)[2], "bias", None)
    never_changes = hf.get_output_embeddings()(torch.zeros_like(W_O[0]) if beta is None else beta)
    constant = centred_correct_logit(never_changes.expand_as(clean["logits"]), tokens)
    frozen = effect(ablated["residual"][last]) + constant
    return {
        "direct_effect": direct,
        "ablated_direct_effect": ablated_direct,
        "logit_change": change,
        "self_repair_heads": other_heads,
        "self_repair_mlps": mlps,
        "sigma_ablated": s_ablated[:, :-1],
        "sigma_clean": s[:, :-1],
        "layernorm_formula": centred_correct_logit(ablated["logits"], tokens) - frozen,
    }


def in_float64(hf):
    """RMSNorm and GPT-Neo's attention compute in float32 whatever the dtype; the reference must not."""
    for module in hf.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(
                lambda x, norm: (
                    norm.weight * x * (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
                ),
                norm=module,
            )
        elif type(module).__name__ == "GPTNeoSelfAttention":
            module._attn = functools.partial(_gpt_neo_attention, module)
    return hf


def _gpt_neo_attention(module, query, key, value, attention_mask=None):
    seen = module.bias[:, :, : query.shape[2], : query.shape[2]]
    pattern = (query @ key.transpose(-1, -2)).masked_fill(~seen, -torch.inf).softmax(-1)
    return pattern @ value, pattern
