"""Replication suite for self-repair in language models (Rushing & Nanda 2024, McGrath et al. 2023)."""

import warnings

import lazy_loader

__version__ = "0.1.0"

# Libraries that we import ask for widgets whenever they meet a notebook; our output is plain text on purpose.
warnings.filterwarnings("ignore", message="IProgress not found")

# What is for others' scripts; everything is imported when it is asked for.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"run.own_model": ["MeasuredHeads", "measure_heads"]}
)
