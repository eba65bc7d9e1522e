"""The processes of a run: started, and able to talk to each other."""

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy

from dive.config import TrainerConfig
from dive.trainer.build import PATIENCE


def connect(config: TrainerConfig) -> None:
    """Let the run's processes talk to each other from here on.

    Those that torchrun or SLURM started are there already. Otherwise Lightning starts them here: each begins with the same
    command.
    """
    if config.devices * config.num_nodes > 1 and not torch.distributed.is_initialized():
        strategy = DDPStrategy(timeout=PATIENCE)
        Fabric(
            accelerator=config.accelerator, devices=config.devices, num_nodes=config.num_nodes, strategy=strategy
        ).launch()
