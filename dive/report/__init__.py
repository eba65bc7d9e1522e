"""What a run shows: plots, tables, the model card."""
