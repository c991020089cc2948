import os

# No test may reach the network: the embedded models and locally made checkpoints must be enough.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
