"""The figures, one module per notebook: seaborn and matplotlib, colour-blind-safe, saved as PNG and PDF.

``style`` holds what all share; ``across_models``, ``token_variation``, ``layernorm``, ``neurons``,
``iterative`` and ``layers`` draw what :mod:`selfrepair.analysis` gives for notebooks 01 to 06.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "across_models": ["effect_against_change", "self_repair_by_depth"],
        "iterative": [
            "alignment_by_layer",
            "cosine_matrices",
            "cosines_by_distance",
            "earlier_against_ablated",
            "effect_after_against_before",
            "slope_by_head",
            "slope_by_scale",
        ],
        "layernorm": ["breakdown_by_layer", "frozen_norm", "scale_ratio_histograms", "ways_of_counting"],
        "layers": [
            "ablation_against_unembedding",
            "compensation_scatter",
            "compensation_slopes",
            "coupling",
            "downstream_change",
            "effects_by_layer",
            "late_mlps",
            "over_training",
        ],
        "neurons": ["cumulative_change", "erasure_shares", "neurons_for_half", "overlaps", "single_neurons"],
        "style": ["looks", "save", "use_style"],
        "token_variation": [
            "by_prompt",
            "correlations",
            "effect_against_change_per_token",
            "share_distributions",
            "spread",
            "within_and_between",
        ],
    },
)
