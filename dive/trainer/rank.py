"""Which of a run's processes this is. Imports nothing heavy."""

import os


def process_rank() -> int:
    """Global rank from the launcher's environment, 0 outside a distributed run; known before any process group."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    return int(os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0")))
