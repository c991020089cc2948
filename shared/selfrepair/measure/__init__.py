"""All that is measured of a model, each kind a :class:`Measurement`; :class:`Task` makes and keeps it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "measurement": ["Measurement", "find_measurement", "measurement_names", "settings_of"],
        "task": ["Task"],
    },
)
