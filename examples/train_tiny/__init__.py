"""Train the embedded pipeline from nothing but a font: ``python -m examples.train_tiny --preset cpu``."""
