"""The engine: runs parts of any model with something ablated, and reads direct effects.

| module | holds |
| --- | --- |
| ``ablations`` | what takes the place of an ablated activation: resample, mean, zero, optimal (add here) |
| ``optimal`` | the constants with which the loss is least |
| ``sites`` | the places that can be ablated: heads, whole attention layers and MLPs |
| ``direct_effect`` | the final norm and each correct token's direction, along which everything is read |
| ``hooks`` | looking into modules while they run, and putting something in their place |
| ``forward`` | one clean pass; any block again with changed inputs |
| ``one_position`` | blocks again at one position, with the clean keys and values before it |
| ``reading`` | a clean pass with what reading it takes: direct effects of heads |
| ``head_ablation`` | the hot path: every head ablated, one at a time |
| ``batches`` | how much goes through a model at once |
| ``identity_check`` | refuses a model whose direct effects are not its logits |
| ``fast`` | the fast path behind its switch |

Importing ``ablations`` loads no PyTorch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["fast"],
    submod_attrs={
        "ablations": ["ABLATIONS", "Ablation", "Constants", "Replacement", "Site", "find_ablation"],
        "batches": ["pairs_that_fit", "partner_batches", "prompts_that_fit", "rows_that_fit"],
        "direct_effect": ["FinalNorm", "token_directions"],
        "forward": [
            "CleanRun",
            "Replay",
            "attention_z",
            "carry",
            "float32_residual",
            "run_clean",
            "z_reached",
        ],
        "head_ablation": ["HeadAblations", "ablate_heads"],
        "hooks": ["before", "input_of", "standing_in", "watching"],
        "identity_check": ["check_identity", "check_tokens"],
        "one_position": ["CleanKeys", "OnePosition"],
        "optimal": ["least_loss"],
        "reading": ["Reading"],
        "sites": ["COMPONENTS", "HEADS", "batches_that_fit"],
    },
)
