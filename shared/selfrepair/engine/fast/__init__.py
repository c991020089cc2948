"""The fast path, all of it behind one switch: ``with fast_path(model) as model:``.

``switch`` turns it on and off and has the allocator's settings, ``linear_maps`` are oneDNN's linear maps with
GELU on the way, ``low_rank`` the first linear maps after a head's ablation. Nothing else that measures
swaps a module's ``forward`` or uses PyTorch's private operators; with ``SELFREPAIR_PLAIN=1`` nothing does.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "low_rank": ["FirstMaps"],
        "switch": ["fast_path"],
    },
)
