"""Domain affinity: how domains behave under each other's pruning, and the groups that follow (DIVE, section 3.1)."""
