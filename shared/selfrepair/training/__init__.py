"""Training of the pocket models: configuration, data, loop, evaluation and model card."""
