"""The figures, by notebook: seaborn and matplotlib, colour-blind-safe, saved as PNG and PDF.

``style`` holds what all share, ``panels`` what figures of one panel per model do; ``by_hand`` (00),
``across_models``, ``token_variation``, ``layernorm``, ``neurons``, ``self_feeding`` and ``iterative`` (05),
``layers`` and ``layer_compensation`` (06), ``who_repairs`` (09) draw what :mod:`selfrepair.analysis` gives.
``tokens_in_context`` colours text.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "across_models": ["effect_against_change", "self_repair_by_depth"],
        "by_hand": ["change_against_expected", "components", "idea", "split"],
        "iterative": [
            "alignment_by_layer",
            "cosine_matrices",
            "cosines_by_distance",
            "earlier_against_ablated",
        ],
        "layernorm": [
            "breakdown_by_layer",
            "restored_by_part",
            "scale_ratio_histograms",
            "shares_and_floors",
            "ways_of_counting",
        ],
        "layer_compensation": [
            "compensation_by_layer",
            "compensation_scatter",
            "compensation_split",
            "coupling",
            "over_training",
        ],
        "layers": [
            "ablation_against_unembedding",
            "downstream_change",
            "effects_by_layer",
            "late_mlps",
            "unembedding_larger",
        ],
        "neurons": ["cumulative_change", "neurons_for_half", "overlaps", "single_neurons"],
        "self_feeding": [
            "effect_after_against_before",
            "slope_by_head",
            "slope_by_scale",
            "slope_by_way",
        ],
        "style": ["looks", "save", "use_style"],
        "top_neurons": [
            "against_controls",
            "few_neurons",
            "first_neuron",
            "frequencies",
            "parts_of_self_repair",
        ],
        "tokens_in_context": ["passages_figure", "passages_html"],
        "token_variation": [
            "all_tokens",
            "by_prompt",
            "correlations",
            "effect_against_change_per_token",
            "share_distributions",
            "spread",
            "within_and_between",
        ],
        "who_repairs": ["alike", "concentration", "growth_matrices", "joint_excess"],
    },
)
