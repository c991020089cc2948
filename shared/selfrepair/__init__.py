"""Replication suite for self-repair in language models (Rushing & Nanda 2024, McGrath et al. 2023)."""

__version__ = "0.1.0"
