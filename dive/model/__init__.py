"""Dense models: loading them, walking their layers, and their Mixture-of-Experts twins."""
