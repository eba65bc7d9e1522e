"""Structured pruning of FFN channels: statistics, importance scores, masks, compensation (FLAP, arXiv 2312.11983)."""
