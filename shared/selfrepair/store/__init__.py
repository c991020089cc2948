"""What was measured, on disk: labelled stores with checksums, names, manifests and code versions."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "code_identity": ["code_files", "code_version"],
        "manifest": ["manifest_of", "read_manifest", "write_manifest"],
        "stores": ["is_whole", "kept", "open_store", "write_store"],
    },
)
