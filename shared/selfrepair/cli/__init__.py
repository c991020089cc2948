"""The command line, ``selfrepair``: ``parser`` says what it takes, ``commands`` what it does, ``main`` how
failures are told."""
