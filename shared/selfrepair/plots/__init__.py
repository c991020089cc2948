"""The figures, one module per notebook: seaborn and matplotlib, colour-blind-safe, saved as PNG and PDF."""
