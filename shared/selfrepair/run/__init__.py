"""Runs of profiles: studies for notebooks, the workflow, the page, and ``verify``."""
