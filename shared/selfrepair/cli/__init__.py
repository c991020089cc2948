"""The command line, ``selfrepair``: what it takes, what it does, how failures are told."""
