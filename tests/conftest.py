import os

# No test may reach the network: the embedded models and locally made checkpoints must be enough.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Every annotated shape and type of the library is checked while the tests run.
from jaxtyping import install_import_hook

install_import_hook("selfrepair", "typechecker.typechecker")
