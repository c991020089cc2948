"""Runs: profiles say what to measure, studies hold it for notebooks, the workflow makes it, the page and
``verify`` show it."""

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
