"""Runs of profiles: studies for notebooks, the workflow, the page, and ``verify``."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "notebooks": ["run_notebooks"],
        "profiles": ["Profile", "load_profile"],
        "record": ["summarise"],
        "study": ["Study"],
        "workflow": ["measure", "plan"],
    },
)
