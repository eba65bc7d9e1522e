"""Evaluation: token perplexity, routing, overlap between experts."""
