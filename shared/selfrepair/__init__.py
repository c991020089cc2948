"""Replication suite for self-repair in language models (Rushing & Nanda 2024, McGrath et al. 2023)."""

import warnings

__version__ = "0.1.0"

# Libraries that we import ask for widgets whenever they meet a notebook; our output is plain text on purpose.
warnings.filterwarnings("ignore", message="IProgress not found")
