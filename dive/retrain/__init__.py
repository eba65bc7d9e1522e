"""Retraining in stages: what is trained, on which text, and the LightningModule that does it."""
