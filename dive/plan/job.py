"""What the configuration asks for, in numbers: tokens, batches, element types, where tensors rest."""

import math
import os
from dataclasses import dataclass, replace

from dive.calibration_domains.texts import domain_names
from dive.config import (
    ArchitectureConfig,
    Compensation,
    Config,
    DeviceConfig,
    Dtype,
    Load,
    Metric,
    StageConfig,
    Start,
    TaskConfig,
)
from dive.errors import require
from dive.plan.parameters import Shapes, shapes

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
CORES_EXPONENT = 0.8
"""On two cores a whole run on a model of 135 M parameters took 1.75 times less than is planned for one."""


@dataclass(frozen=True, slots=True)
class Job:
    """A run to be planned."""

    config: Config
    architecture: ArchitectureConfig
    shapes: Shapes
    domains: int
    """Number of calibration domains."""
    device_name: str
    device: DeviceConfig
    cores: int | None = None
    """Of the device, if it is a CPU."""

    @property
    def place(self) -> str:
        """What the device is called in a sentence."""
        if self.cores is None:
            return self.device_name
        return f"{self.device_name} ({self.cores} core{'s' if self.cores > 1 else ''})"

    @property
    def on_gpu(self) -> bool:
        """Whether weights rest in a memory of their own."""
        return self.device.memory is not None

    @property
    def dtype(self) -> str:
        """Element type of the weights."""
        stated = self.config.model.dtype
        assert stated is not None, "settled by the device"
        return self.architecture.dtype if stated is Dtype.auto else stated.value

    @property
    def weight(self) -> int:
        """Bytes of a weight."""
        return BYTES[self.dtype]

    @property
    def exported_weight(self) -> int:
        """Bytes of a weight in the export."""
        stated = self.config.model.export_dtype
        if stated is None:
            return self.weight
        return BYTES[self.architecture.dtype if stated is Dtype.auto else stated.value]

    @property
    def streamed(self) -> bool:
        """Whether the dense model is read a layer at a time."""
        return self.config.model.load is Load.streamed

    @property
    def training_dtype(self) -> str:
        """Element type that training computes in: of mixed precision, or of the weights."""
        precision = self.config.trainer.precision
        return self.dtype if precision.startswith("32") else ("bfloat16" if precision.startswith("bf16") else "float16")

    @property
    def trained_weight(self) -> int:
        """Bytes of a trained parameter: mixed precision keeps them in float32."""
        return 4 if self.config.trainer.precision.endswith("-mixed") else self.weight

    @property
    def world(self) -> int:
        """Processes of retraining."""
        return self.config.trainer.devices * self.config.trainer.num_nodes

    # ------------------------------------------------------------------------------------------------------- calibration

    @property
    def refits(self) -> bool:
        """Whether second moments are taken and solved with."""
        return self.config.pruning.compensation is Compensation.least_squares

    @property
    def eliminates(self) -> bool:
        """Whether channels are chosen by elimination."""
        return self.config.pruning.metric is Metric.obs

    @property
    def clusters_tokens(self) -> bool:
        """Whether experts begin with k-means on the tokens of each layer."""
        refined = self.config.moe.refined
        return (
            refined is not None
            and self.config.moe.experts > 1
            and self.config.grouping is None
            and refined.start is not Start.random
        )

    @property
    def distils(self) -> bool:
        """Whether routers are fitted to the experts' errors."""
        return self.config.moe.distils

    def building_sequences(self, groups: int, *, experts: int) -> int:
        """Calibration sequences of the groups that so many experts are built from; groups yet to be mined count as equal.

        ``group_samples`` of all domains together are as many times as many as there are experts.
        """
        domains = self.config.calibration_domains
        given = self.config.affinity.groups
        sizes = [len(g) for g in given] if given is not None and len(given) == groups else None
        if sizes is None:
            sizes = [self.domains // groups + (i < self.domains % groups) for i in range(groups)]
        if domains.group_samples is None:
            return sum(sizes) * domains.samples + domains.generated
        wanted = domains.group_samples * (experts if groups == 1 else 1)
        shares = (min(wanted // size + (i < wanted % size), domains.samples) for size in sizes for i in range(size))
        return sum(shares) + domains.generated

    @property
    def groups(self) -> int:
        """Groups of domains that experts are built from; one of all domains where they begin otherwise."""
        return self.config.moe.experts if self.config.grouping is not None else 1

    # -------------------------------------------------------------------------------------------------------- evaluation

    @property
    def evaluation_windows(self) -> list[tuple[int, int]]:
        """(windows, tokens of each) of every evaluation text; the domains' at the first length come first."""
        config = self.config.eval
        windows = config.windows or self.config.plan.windows
        of_domains = [(self.domains * windows, length) for length in config.lengths]
        return of_domains + [(windows, length) for entry in config.sets.values() for length in entry.lengths]

    @property
    def tasks(self) -> list[tuple[int, int]]:
        """(sequences, tokens of each) of every task: each question with each of its answers."""
        config, taken = self.config.eval, self.config.plan
        found = []
        for name in config.tasks:
            own = config.task_settings.get(name, TaskConfig())
            questions = own.limit or config.task_limit or taken.questions
            found.append((questions * taken.answers, taken.question_tokens * (1 + (own.shots or 0))))
        return found

    # -------------------------------------------------------------------------------------------------------- retraining

    def steps(self, stage: StageConfig) -> int:
        """Optimiser steps."""
        return math.ceil(stage.tokens / (stage.batch * self.config.retrain.length))

    def micro_batch(self, stage: StageConfig) -> int:
        """Sequences of one forward pass on one device."""
        return stage.batch // (self.config.accumulation(stage) * self.world)


def describe_job(config: Config, architecture: ArchitectureConfig, name: str) -> Job:
    """The numbers of a configuration.

    Args:
        name: of the device, or ``auto``.

    Raises:
        UserError: the pruning ratio leaves no channel, or a calibration domain is unknown.
    """
    if name == "auto":
        name = "cpu" if config.trainer.accelerator == "cpu" else "h100"
    require(name in config.plan.devices, f"plan.device={name}: plan.devices has none of this name")
    device, cores = config.plan.devices[name], None
    if device.memory is None:
        cores = config.plan.cores or cores_here()
        device = of_cores(device, cores)
    return Job(
        config=config.settled(gpu=config.plan.devices[name].memory is not None),
        architecture=architecture,
        shapes=shapes(architecture, config),
        domains=len(domain_names(config.calibration_domains)),
        device_name=name,
        device=device,
        cores=cores,
    )


def cores_here() -> int:
    """Threads of this machine that a process's matrix products would take."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def of_cores(one: DeviceConfig, cores: int) -> DeviceConfig:
    """A CPU of several cores like ``one``; what they reach together grows by less than their number."""
    gain = cores**CORES_EXPONENT
    return replace(one, bfloat16=one.bfloat16 * gain, float32=one.float32 * gain, float64=one.float64 * gain)
