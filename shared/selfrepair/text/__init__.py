"""What models read.

``corpora`` cuts prose into prompts, ``hub_datasets`` reads that of the Hugging Face hub, ``gazetteer`` is the
invented world that embedded models know (its words are in ``world``), ``facts`` are prompts that ask for one,
and which of them a model answers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "corpora": ["Prompts", "hash_documents", "load_tokens", "pack", "read_documents"],
        "facts": ["AskedFact", "FactPrompts", "choose_prompts", "facts_for"],
        "gazetteer": ["Gazetteer"],
    },
)
