"""What the measured numbers say: the NumPy half, from labelled datasets to tables, estimates and claims.

``estimates`` are values with bootstrap samples, ``rules`` what the papers claim and what decides it
(``claims.yaml``, ``statistics.yaml``), ``claims`` the verdicts, ``published`` the authors' numbers,
``comparison`` ours beside them.
``self_repair`` says what self-repair is, ``shares`` which tokens are a head's.
What the notebooks ask is in ``head_table`` and ``head_means`` (01), ``token_variation``, ``token_shares``
and ``examples`` (02), ``breakdown`` and ``layernorm`` (03), ``neurons``, ``neuron_repair``, ``neuron_sets``
and ``neuron_examples`` (04), ``self_feeding``, ``earlier_input``, ``cosines``, ``layer_orders`` and
``iterative`` (05), ``layers``, ``layer_means``, ``layer_findings`` and ``worked_prompt`` (06), ``counting``
and ``mirror`` (07), ``arms`` (08), ``head_growth``, ``joint_ablation`` and ``who_repairs`` (09).
``passages`` are stretches of text with a number for each token, ``head_tokens`` those of every head for the
results page, ``words`` says numbers as text and tables have them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "breakdown": ["Breakdown", "PartMeans"],
        "claims": ["Statistics", "claims_table", "read_claims", "verdicts", "write_claims"],
        "comparison": ["compare_with_published"],
        "estimates": ["Estimate", "draws", "mean_over_prompts", "selected_means"],
        "head_growth": ["PairGrowth"],
        "head_means": ["HeadMeans", "head_statistics"],
        "head_table": ["heads_of_models", "heads_table", "strongest_head", "write_heads"],
        "iterative": ["iterative_statistics"],
        "joint_ablation": ["JointCosts"],
        "layer_means": ["LayerMeans"],
        "layernorm": ["ScaleRatios", "layernorm_statistics"],
        "layers": ["LayerRun"],
        "neuron_repair": ["NeuronRepair"],
        "neurons": ["ModelNeurons"],
        "published": ["published_heads", "published_name", "published_self_feeding"],
        "rules": ["Claim", "Statistic", "judge", "load_claims", "load_statistics", "verdict"],
        "self_feeding": ["self_feeding_table"],
        "token_variation": ["TokenNoise"],
        "who_repairs": ["who_repairs_statistics"],
    },
)
