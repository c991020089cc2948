"""What the assignments in ``course/`` import: a model as plain tensors, random models, and comparisons."""
