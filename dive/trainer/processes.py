"""What the processes of a run tell each other outside training."""

import time

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy

from dive.config import TrainerConfig
from dive.errors import UserError
from dive.trainer.build import PATIENCE


def connect(config: TrainerConfig) -> None:
    """Let the processes that torchrun or SLURM started talk to each other before the first training.

    Those that Lightning starts by itself begin in the middle of a training, which connects them.
    """
    external = TorchElasticEnvironment.detect() or SLURMEnvironment.detect()
    if external and config.devices * config.num_nodes > 1 and not torch.distributed.is_initialized():
        strategy = DDPStrategy(timeout=PATIENCE)
        Fabric(
            accelerator=config.accelerator, devices=config.devices, num_nodes=config.num_nodes, strategy=strategy
        ).launch()


def connected() -> bool:
    """Whether this process can talk to others."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def from_first(value: int) -> int:
    """The first process's ``value``, in every process; waits for it.

    Waiting happens in Python, not inside the collective call, so that a signal still ends this process.

    Raises:
        UserError: the first process has ended.
    """
    if not connected():
        return value
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    message = torch.tensor([value], device=device)
    try:
        work = torch.distributed.broadcast(message, src=0, async_op=True)
        while not work.is_completed():
            time.sleep(0.02)
        work.wait()
    except RuntimeError as error:
        raise UserError("the first process of this run has ended; what it said tells why") from error
    return int(message)
