"""What a run will cost, from its configuration alone: parameters, tokens, FLOPs, memory, disk, time."""
