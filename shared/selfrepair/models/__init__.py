"""Models: finding and loading them, refusing those that break the definitions, and naming their parts.

``checkpoints`` finds models by name, ``hub`` asks whether that of Hugging Face answers,
``architectures`` has a record of every family that is measured, ``support`` refuses the others with the
reason, ``loading`` gives a :class:`Model` by the parts that ``parts`` finds, and ``devices`` chooses where it
runs and how exactly.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checkpoints": ["embedded_models"],
        "loading": ["Model", "load_hf", "load_model"],
        "support": ["check_supported"],
    },
)
