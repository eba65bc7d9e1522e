"""The stages of a run and what each costs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dive.config import ArchitectureConfig, Config, CorpusSource, DeviceConfig, StageConfig, StageText
from dive.model.architecture import GGUF
from dive.plan import construction, flops, memory
from dive.plan.job import Job, describe_job
from dive.plan.memory import Memory
from dive.plan.parameters import reached, shapes, trained
from dive.results import DEQUANTISED, GENERATED, PRUNED, RECONSTRUCTED
from dive.retrain.parts import BYTES, parts_of

TOKENISED = 3e5
"""Tokens a second of one core, as measured with vocabularies of 2 k and 49 k; tokenizers share texts out over the cores."""
HOST_CORES = 8
"""Of a machine with a GPU, as tokenizers count."""


@dataclass(slots=True)
class Stage:
    """One stage."""

    name: str
    kind: str
    """Of the artifact in the store that it makes, or ``export``."""
    tokens: int
    """That it reads, repetitions included."""
    flops: Mapping[str, float]
    """{element type: operations}, see :mod:`dive.plan.flops`"""
    memory: Memory
    moved: float = 0.0
    """Bytes of weights and optimiser states that the device's memory gives and takes."""
    linked: float = 0.0
    """Bytes between host and device."""
    clustered: float = 0.0
    """Bytes that k-means reads in the memory of the first process's device, while the others wait."""
    tokenised: float = 0.0
    """Tokens that the first process makes of text on the host, while the others wait."""
    written: float = 0.0
    """Bytes that stay on the disk."""
    temporary: float = 0.0
    """Bytes on the disk beside them while it runs."""
    trained: int = 0
    """Parameters."""
    processes: int = 1
    """That share it out."""
    owners: int | None = None
    """Things that are solved (float64), each in one process; none where that bounds nothing."""
    alone: float = 0.0
    """Operations of all element types, of those above, that the first process does while the others wait."""
    seconds: float = 0.0
    """On the named device."""

    @property
    def operations(self) -> float:
        """FLOPs of all element types."""
        return sum(self.flops.values())


@dataclass(slots=True)
class Plan:
    """What a run will cost."""

    job: Job
    parameters: dict[str, int]
    stages: list[Stage] = field(default_factory=list)

    @property
    def host(self) -> float:
        """Peak of the host's memory, bytes."""
        return max(stage.memory.host_peak for stage in self.stages)

    @property
    def device(self) -> float:
        """Peak of one device's memory, bytes; 0 on CPUs."""
        return max(stage.memory.device_peak for stage in self.stages)

    @property
    def store(self) -> float:
        """Bytes that the run leaves in the store."""
        return sum(stage.written for stage in self.stages if stage.kind != "export")

    @property
    def export(self) -> float:
        """Bytes of the exported model."""
        return sum(stage.written for stage in self.stages if stage.kind == "export")

    @property
    def checkpoints(self) -> float:
        """Bytes of a running stage's checkpoints at most; they go when it ends."""
        return max(stage.temporary for stage in self.stages)

    @property
    def disk(self) -> float:
        """Bytes on the disk at most, taking the largest checkpoints as lying beside everything else."""
        return self.store + self.export + self.checkpoints

    @property
    def retraining_tokens(self) -> int:
        """Tokens of the stages of retraining, without those that count as calibration."""
        stages = self.job.config.retrain.stages
        retrained = [stage for stage in self.stages if stage.kind == "retrained"]
        return sum(stage.tokens for stage in retrained if stages[stage.name].text is StageText.corpus)

    @property
    def seconds(self) -> float:
        """Of all stages on the named device."""
        return sum(stage.seconds for stage in self.stages)

    def summary(self) -> dict[str, Any]:
        """For ``results.json``."""
        return {
            "device": self.job.device_name,
            "cores": self.job.cores,
            "utilisation": self.job.device.utilisation,
            "parameters": self.parameters,
            "host_bytes": self.host,
            "device_bytes": self.device,
            "disk_bytes": {"store": self.store, "export": self.export, "checkpoints": self.checkpoints},
            "seconds": self.seconds,
            "stages": [
                {
                    "name": stage.name,
                    "tokens": stage.tokens,
                    "flops": stage.operations,
                    "host_bytes": stage.memory.host_peak,
                    "device_bytes": stage.memory.device_peak,
                    "disk_bytes": stage.written,
                    "seconds": stage.seconds,
                }
                for stage in self.stages
            ],
        }


def plan(config: Config, architecture: ArchitectureConfig, *, device: str | None = None) -> Plan:
    """What a run of this configuration will cost, were nothing of it in the store yet.

    Args:
        device: one of ``plan.devices``, in place of ``plan.device``.

    Raises:
        UserError: the pruning ratio leaves no channel, or a calibration domain is unknown.
    """
    job = describe_job(config, architecture, device or config.plan.device)
    s, domains = job.shapes, config.calibration_domains
    stages = [_dequantising(job)] if config.model.path.endswith(GGUF) else []
    if domains.generated:
        stages.append(_generating(job))
    if config.mines:
        stages += [_calibration(job, "calibration", domains.samples, domains.length), _mining(job)]
    elif config.maps and job.domains > 2:
        stages.append(_calibration(job, "mining", *config.affinity.mapped_of(domains.samples, domains.length)))
    refined = construction.refinement(config)
    one_shot = s.experts == 1 and refined is None
    if one_shot or not job.streamed:  # one pruned expert is there to be measured, which shares nothing
        alone = replace(job, shapes=shapes(architecture, config, replace(config.moe, experts=1, top_k=1)))
        stages.append(_building(alone, PRUNED, experts=1, groups=1, refined=None))
    if not one_shot:
        stages.append(_building(job, RECONSTRUCTED, experts=s.experts, groups=job.groups, refined=refined))
    before: list[StageConfig] = []
    for name, retrained in config.retrain.stages.items():
        stages.append(_retraining(job, name, retrained, before))
        before.append(retrained)
    stages += [_export(job)] if job.streamed else [_evaluation(job), _export(job)]
    for stage in stages:
        stage.seconds = seconds(stage, job.device, config.plan.disk, cores=job.cores or HOST_CORES)
    return Plan(
        job,
        {
            "dense": s.dense,
            "total": s.total,
            "active": s.active,
            "noise": s.noise_weights,
            "bias": s.biases,
            "trained": reached(s, before),
        },
        stages,
    )


def seconds(stage: Stage, device: DeviceConfig, disk: float, *, cores: int) -> float:
    """Time of a stage: arithmetic at the stated utilisation, weights read, transfers and files, one after another.

    What processes tell each other is not counted.
    """
    peaks = {
        "bfloat16": device.bfloat16,
        "float16": device.bfloat16,
        "float32": device.float32,
        "float64": device.float64,
    }
    processes = dict.fromkeys(stage.flops, stage.processes)
    if stage.owners is not None and "float64" in processes:
        processes["float64"] = min(stage.processes, stage.owners)
    whole = sum(count / (peaks[kind] * device.utilisation) for kind, count in stage.flops.items())
    shared = sum(count / (peaks[kind] * device.utilisation * processes[kind]) for kind, count in stage.flops.items())
    alone = stage.alone / max(stage.operations, 1.0)
    arithmetic = alone * whole + (1.0 - alone) * shared
    moving = stage.moved / device.bandwidth + (stage.linked / device.link if device.memory is not None else 0.0)
    moving /= stage.processes
    alone_moving = stage.clustered / device.bandwidth + stage.tokenised / (TOKENISED * cores)
    return arithmetic + moving + alone_moving + stage.written / disk


def _sum(*parts: tuple[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for kind, count in parts:
        found[kind] = found.get(kind, 0.0) + count
    return {kind: count for kind, count in found.items() if count}


def _dequantising(job: Job) -> Stage:
    """Its arithmetic is not counted: it takes less than writing."""
    written = float(job.shapes.dense * job.weight)
    return Stage(DEQUANTISED, "dequantised", 0, {}, memory.dequantising(job), moved=written, written=written)


def _generating(job: Job) -> Stage:
    """Text that the dense model writes, a token of every row at a time: all weights are read for each."""
    s, domains = job.shapes, job.config.calibration_domains
    rows = min(domains.generated, memory.GENERATED_ROWS)
    steps = math.ceil(domains.generated / rows) * domains.length
    tokens = domains.generated * domains.length
    cache = rows * domains.length * s.layers * 2 * s.keys * job.weight  # copied as it grows: read, written, and read
    return Stage(
        GENERATED,
        "generated",
        tokens,
        {job.dtype: float(tokens * flops.dense_forward(s, domains.length))},
        memory.generating(job, rows),
        moved=float(steps * (s.dense * job.weight + 1.5 * cache)),
        written=8.0 * tokens,
        alone=float(tokens * flops.dense_forward(s, domains.length)),
    )


def _calibration(job: Job, name: str, samples: int, length: int) -> Stage:
    """Statistics of so many sequences of so many tokens of each domain."""
    s, domains = job.shapes, job.config.calibration_domains
    tokens = job.domains * samples * length
    passes = math.ceil(samples / domains.batch) * job.domains
    return Stage(
        name,
        "statistics",
        tokens,
        {job.dtype: tokens * s.layers * flops.dense_layer(s, length)},
        memory.calibration(job, sequences=job.domains * samples, length=length),
        moved=float(passes * s.dense * job.weight),
        linked=float(2 * s.layers * tokens * s.hidden * job.weight),
        written=float(job.domains * s.layers * s.channels * 16),
        processes=job.world,
    )


def _mining(job: Job) -> Stage:
    s, domains, affinity = job.shapes, job.config.calibration_domains, job.config.affinity
    pairs = job.domains**2
    tokens = pairs * affinity.samples * domains.length
    passes = pairs * math.ceil(affinity.samples / domains.batch)
    return Stage(
        "mining",
        "matrix",
        tokens,
        {job.dtype: tokens * flops.dense_forward(s, domains.length)},
        memory.mining(job),
        moved=float(passes * s.dense * job.weight),
        processes=min(job.world, job.domains),
    )


def _building(job: Job, name: str, *, experts: int, groups: int, refined: construction.Refinement | None) -> Stage:
    s, domains, moe = job.shapes, job.config.calibration_domains, job.config.moe
    sequences = job.building_sequences(groups, experts=experts)
    tokens = sequences * domains.length
    moved = float(math.ceil(sequences / domains.batch) * s.dense * job.weight)
    parts = [(job.dtype, float(tokens * s.layers * flops.dense_layer(s, domains.length)))]
    if refined is not None:
        work = construction.refine(s, refined, moe.distillation, tokens, domains.length)
        parts.append(("float32", s.sparse * work))
        parts.append(("float64", float(s.sparse * construction.refine_solves(s, refined, eliminates=job.eliminates))))
    elif job.refits:
        each = construction.solve(s) + (construction.eliminate(s) if job.eliminates else 0)
        parts.append(("float32", float(s.sparse * construction.moments(s, tokens))))
        parts.append(("float64", float(s.sparse * experts * each)))
    if refined is None and job.distils and experts > 1:
        sampled = min(moe.distillation.tokens, tokens)
        work = construction.router_fit(s, moe.distillation, sampled) + sampled * 2 * s.ffn  # whose output is the target
        parts.append(("float32", float(s.sparse * work)))
    if moe.scales and experts > 1:
        seen = tokens if refined is not None else min(moe.distillation.tokens, tokens)
        passes = 2 if refined is not None and moe.top_k > 1 else 1
        targets = 0 if refined is not None else 2 * s.ffn
        parts.append(("float32", float(s.sparse * passes * seen * (2 * moe.top_k * s.expert + targets))))
    clusters = job.clusters_tokens and refined is not None
    clustering = float(s.sparse * construction.kmeans(s, tokens)) if clusters else 0.0
    sampled_inputs = float(s.sparse * construction.kmeans_sample(s, tokens)) if clusters else 0.0
    parts.append(("float32", clustering))
    of_layer = experts * (s.expert * job.weight + s.hidden * job.weight * (1 + s.bias) + s.channels)
    of_layer += s.shared_expert * job.weight if experts > 1 else 0
    return Stage(
        name,
        "experts",
        tokens,
        _sum(*parts),
        memory.building(job, experts=experts, groups=groups, sequences=sequences, refined=refined),
        moved=moved,
        linked=float(2 * s.layers * tokens * s.hidden * job.weight) + sampled_inputs,
        clustered=float(s.sparse * construction.kmeans_moved(s, tokens)) if clusters else 0.0,
        written=float(s.sparse * of_layer),
        processes=job.world if refined is None else min(job.world, experts),
        owners=experts,
        alone=clustering,
    )


def _retraining(job: Job, name: str, stage: StageConfig, before: list[StageConfig]) -> Stage:
    s, config = job.shapes, job.config
    steps, length = job.steps(stage), config.retrain.length
    tokens = steps * stage.batch * length
    each = flops.training(s, stage, length, checkpointing=config.trainer.gradient_checkpointing)
    if stage.teacher.wanted:
        each += flops.dense_forward(s, length)
    learned = sum(trained(s, [stage.train]).values())
    kept = sum(trained(s, [*(b.train for b in before), stage.train]).values())
    passes = math.ceil(tokens / (job.micro_batch(stage) * length))
    checkpoint = 3 * learned * job.trained_weight  # with Adam's states
    one_text = config.retrain.corpus.chosen is CorpusSource.domains
    start = sum(job.steps(earlier) * earlier.batch for earlier in before if one_text or earlier.text is stage.text)
    ends = [_tokenised(blocks, length) for blocks in (start, start + steps * stage.batch)]
    made = float(ends[1] - ends[0])
    return Stage(
        name,
        "retrained",
        tokens,
        {job.training_dtype: float(tokens * each)},
        memory.retraining(job, stage, before),
        moved=float(passes * 2 * s.total * job.weight + steps * job.world * 28 * learned),
        tokenised=made,
        written=float(kept * job.trained_weight) + BYTES * made,
        temporary=float((2 if steps > 2 * config.retrain.checkpoint_every else 1) * checkpoint)
        if steps >= config.retrain.checkpoint_every
        else 0.0,
        trained=reached(s, [stage]),
        processes=job.world,
    )


def _tokenised(blocks: int, length: int) -> int:
    """Tokens of the parts of a corpus that its first blocks lie in."""
    parts = parts_of(range(blocks), length)
    return parts[-1][1].stop * length if parts else 0


def _evaluation(job: Job) -> Stage:
    """Every model of the run: dense, one pruned expert, reconstructed, and each retrained stage's."""
    s, config = job.shapes, job.config
    pruned = s.dense - s.sparse * (s.ffn - s.expert - s.shared_expert)
    count = tokens = alone = 0.0
    for number, (windows, length) in enumerate([*job.evaluation_windows, *job.tasks]):
        each = windows * length
        sparse = flops.sparse_forward(s, length, active=s.top_k)
        single = flops.head(s) + s.sparse * (
            flops.attention(s, length) + 2 * (s.expert + s.shared_expert) + 2 * s.hidden
        )
        single += s.kept * flops.dense_layer(s, length)
        models = 1 + len(config.retrain.stages)
        work = each * (flops.dense_forward(s, length) + single + models * sparse)
        count += work
        alone += work if number >= len(job.evaluation_windows) else 0.0
        tokens += each * (2 + models)
    windows, length = job.evaluation_windows[0]  # how the domains are routed
    models = 1 + len(config.retrain.stages)
    count += models * windows * length * (flops.sparse_forward(s, length, active=s.top_k) - flops.head(s))
    tokens += models * windows * length
    passes = sum(math.ceil(windows / config.eval.batch) for windows, _ in [*job.evaluation_windows, *job.tasks])
    return Stage(
        "evaluation",
        "evaluation",
        int(tokens),
        {job.dtype: count},
        memory.evaluation(job),
        moved=float(passes * job.weight * (s.dense + pruned + (1 + models) * s.total)),
        processes=job.world,
        alone=alone,
    )


def _export(job: Job) -> Stage:
    s = job.shapes
    size = float(job.exported_weight * (s.total + (s.biases if s.bias else s.tied_head)))
    return Stage("export", "export", 0, {}, memory.export(job), moved=16 * size, written=size)
