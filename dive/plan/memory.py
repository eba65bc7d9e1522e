"""What fills the memory in each stage, as this implementation goes about it.

``rest`` is what weights and activations rest in: the device's memory, or the host's where the run is on CPUs.

Shapes: L layers, D hidden width, F FFN channels, W channels kept, E experts, G groups, V vocabulary, n tokens of one pass.
"""

from dataclasses import dataclass, field

from dive.config import SHARD_BYTES, Freezing, Mode, StageConfig, Storage
from dive.plan import construction
from dive.plan.job import BYTES, Job
from dive.plan.parameters import trained

PROCESS = 0.55e9
"""Bytes of host memory of a process that has imported everything, before it loads a model."""
RETAINED = 0.15e9
"""Bytes that the C library keeps of what earlier stages gave back; measured, and the same for small and large models."""
CONTEXT = 0.6e9
"""Bytes of device memory that CUDA and its libraries take for themselves."""
LOGITS = 12
"""Bytes of every logit at the peak of the loss: two float32 copies and the logarithm of the softmax."""


@dataclass(slots=True)
class Memory:
    """{what: bytes} at the peak of a stage."""

    host: dict[str, float] = field(default_factory=lambda: {"process": PROCESS})
    device: dict[str, float] = field(default_factory=dict)

    @property
    def host_peak(self) -> float:
        """Bytes."""
        return sum(self.host.values())

    @property
    def device_peak(self) -> float:
        """Bytes."""
        return sum(self.device.values())


def _memory(job: Job, rest: dict[str, float], host: dict[str, float] | None = None, *, first: bool = False) -> Memory:
    found = Memory()
    if not first:
        found.host["allocator"] = RETAINED
    if job.on_gpu:
        found.device = {"context": CONTEXT} | rest
    else:
        found.host |= rest
    for name, size in (host or {}).items():
        found.host[name] = found.host.get(name, 0.0) + size
    return found


def dequantising(job: Job) -> Memory:
    """The mapped file stays in memory where there is room, which is not counted."""
    s = job.shapes
    largest = max(s.vocabulary * s.hidden, s.hidden * s.channels)
    shard = min(float(s.dense * job.weight), float(max(SHARD_BYTES, job.weight * largest)))
    return _memory(job, {}, {"a shard": shard, "a tensor in float32, twice": 8.0 * largest}, first=True)


def _attention(job: Job) -> float:
    """Numbers a token, at the peak of an attention block: queries and keys before and after RoPE, values, output."""
    s = job.shapes
    return 2 * s.hidden + 3 * s.queries + 3 * s.keys


def dense_layer(job: Job, tokens: int) -> float:
    """Activations of one dense layer without gradients: residual and normed inputs, and three of F channels."""
    s = job.shapes
    return tokens * job.weight * (2 * s.hidden + max(_attention(job), 2 * s.hidden + 3 * s.channels))


def sparse_layer(job: Job, tokens: int, active: int) -> float:
    """The same of one layer of experts: gate and up in one, their product, rows sorted by expert, outputs."""
    s = job.shapes
    return tokens * job.weight * (2 * s.hidden + max(_attention(job), active * (4 * s.width + 3 * s.hidden)))


def dense_model(job: Job) -> float:
    """Bytes of the dense model: whole, or streamed one layer at a time and the tensor that is being read."""
    s = job.shapes
    if job.streamed:
        return float(job.weight * (s.ffn + s.attention + s.norms + s.hidden * (1 + s.channels)))
    return float(job.weight * s.dense)


def calibration(job: Job) -> Memory:
    """One pass of the dense model over all domains, layer after layer."""
    s, domains = job.shapes, job.config.calibration_domains
    tokens = domains.batch * domains.length
    statistics = job.domains * s.layers * s.channels * 16
    rest = {"dense model": dense_model(job), "activations": dense_layer(job, tokens) + tokens * _extra(job)}
    return _memory(
        job, rest, {"hidden states": _hidden(job, job.sequences), "statistics": float(statistics)}, first=True
    )


def _extra(job: Job) -> float:
    """Bytes a token that the statistics add: channels in float32."""
    return 0.0 if job.weight == 4 else 4.0 * job.shapes.channels


def _hidden(job: Job, sequences: int) -> float:
    """Hidden states of all calibration tokens between two layers, on the host."""
    return float(sequences * job.config.calibration_domains.length * job.shapes.hidden * job.weight)


def mining(job: Job) -> Memory:
    """The dense model pruned by masks, on every domain's text."""
    s, domains = job.shapes, job.config.calibration_domains
    tokens = min(domains.batch, job.config.affinity.samples) * domains.length
    masks = job.domains * s.layers * s.channels * (1 + 16)
    rest = {
        "dense model": float(job.weight * s.dense),
        "activations": dense_layer(job, tokens) + tokens * job.weight * s.channels,
        "logits": float(tokens * s.vocabulary * LOGITS),
    }
    return _memory(job, rest, {"masks and statistics": float(masks)}, first=True)


def building(job: Job, *, experts: int, groups: int, sequences: int, refined: construction.Refinement | None) -> Memory:
    """A pass over the calibration tokens, and one layer's experts at a time."""
    s, domains, moe = job.shapes, job.config.calibration_domains, job.config.moe
    tokens = domains.batch * domains.length
    sums = (groups + 2) * construction.moment_bytes(s) if job.refits else 0  # two more while one is added
    sampled = min(moe.distillation.tokens, sequences * domains.length) if job.distils and experts > 1 else 0
    layer = experts * s.expert * job.weight
    solve = construction.solve_bytes(s) - 2 * construction.moment_bytes(s) if job.refits else 0
    errors = min(2048, sampled) * job.weight * (3 * s.channels + 4 * s.hidden)
    fit = sampled * s.hidden * 4 * 2
    stacking = layer * 5 / 3  # gate and up expert by expert and then in one, beside the down projections
    # Taking moments, solving and fitting follow each other; the moments stay.
    rest = {
        "dense model": dense_model(job),
        "second moments": float(sums),
        "sampled inputs": float(sampled * s.hidden * job.weight * 2),
        "last batch": float(tokens * (s.hidden + s.channels) * job.weight),
        "activations, solve or fit": max(
            dense_layer(job, tokens) + tokens * _extra(job), layer + solve, stacking, layer + errors + fit
        ),
    }
    host = {"hidden states": _hidden(job, sequences)}
    if refined is not None:
        rest["second moments"] = 0.0  # of one expert at a time, and counted there
        rest["refinement"] = float(construction.refine_device_bytes(s, refined))
        host["refinement"] = float(construction.refine_host_bytes(s, sequences * domains.length, job.weight))
    return _memory(job, rest, host, first=job.streamed)


def evaluation(job: Job) -> Memory:
    """The Mixture-of-Experts beside the dense model, which stays loaded; weights reach a GPU by way of the host."""
    s, batch = job.shapes, job.config.eval.batch
    tokens = max(min(batch, windows) * length for windows, length in job.evaluation_windows)
    rest = _both(job) | {
        "activations": max(dense_layer(job, tokens), sparse_layer(job, tokens, s.top_k)),
        "logits": float(tokens * s.vocabulary * LOGITS),
    }
    # Of the dense model all at once, of the experts two layers'.
    loading = max(s.dense if job.on_gpu else 0, 2 * s.experts * s.expert)
    return _memory(job, rest, {"loading": float(loading * job.weight)})


def _both(job: Job, stage: StageConfig | None = None, *, exported: bool = False) -> dict[str, float]:
    """The dense model and its Mixture-of-Experts, as the latter rests in a stage of training, in evaluation or in the export."""
    s, moe = job.shapes, job.config.moe
    found = {"dense model": float(job.weight * s.dense)}
    if job.config.retrain.storage is Storage.materialised or exported:
        return found | {"Mixture-of-Experts": float(job.weight * (s.total + s.biases))}
    own = s.shared + s.biases + s.layers * s.router
    slices = moe.construction in ("plain", "upcycle") and not job.refits
    own += 0 if slices else s.layers * s.experts * s.expert // 3
    if stage is not None:  # what it leaves frozen is the dense model's
        own -= s.layers * s.attention if stage.train.attention is Freezing.frozen else 0
        frozen = Freezing.frozen in (stage.train.embeddings, stage.train.head)
        own -= s.vocabulary * s.hidden * (1 if s.tied else 2) if frozen else 0
    return found | {
        "Mixture-of-Experts": float(job.weight * own),
        "indices": 8.0 * s.layers * s.experts * s.width,
        "one layer's gathered experts": float(job.weight * s.experts * s.expert // 3),
    }


def retraining(job: Job, stage: StageConfig, before: list[StageConfig]) -> Memory:
    """One process: weights, adapters, gradients, Adam's two states, what the backward pass needs, logits.

    FSDP shards what is trained; the weights are put together on every process before they are sharded.
    """
    s, config = job.shapes, job.config
    tokens = job.micro_batch(stage) * config.retrain.length
    plugged = trained(s, [*(b.train for b in before), stage.train])
    extra = sum(size for name, size in plugged.items() if name.endswith(".lora")) + s.noise_weights
    mixed = config.trainer.precision.endswith("-mixed")
    masters = sum(size for name, size in plugged.items() if not name.endswith(".lora")) if mixed else 0
    learned = sum(trained(s, [stage.train]).values())
    rest = _both(job, stage) | {
        "adapters": float(extra * job.trained_weight + masters * (4 - job.weight)),
        "gradients": float(learned * job.trained_weight),
        "Adam": float(2 * learned * job.trained_weight),
        "activations": saved_activations(job, stage, tokens),
        "logits": float(tokens * s.vocabulary * LOGITS),
    }
    compute = BYTES[job.training_dtype]
    if compute != job.weight:
        rest["weights cast"] = float(compute * s.total)
    if stage.teacher.wanted:
        rest["teacher"] = dense_layer(job, tokens) + tokens * s.vocabulary * LOGITS
    processes = config.trainer.devices
    found = _memory(job, rest)
    if processes > 1:
        found.host = {f"{name} × {processes} processes": size * processes for name, size in found.host.items()}
    return found


def saved_activations(job: Job, stage: StageConfig, tokens: int) -> float:
    """What the forward pass keeps for the backward pass, and the latter's working set of one layer, in bytes.

    Norms keep their inputs in the residual stream's type; a router and a block of experts keep what is listed here,
    by grouped products; on a CPU experts without dropout keep less (:mod:`dive.moe.cpu_experts`). With gradient
    checkpointing a layer's input is kept, and one layer's at a time.
    """
    s, config = job.shapes, job.config
    compute = BYTES[job.training_dtype]
    residual = max(compute, job.trained_weight)
    active = s.experts if stage.mode is Mode.dense else s.top_k
    weights_trained = stage.train.experts is not Freezing.frozen
    norms_trained = stage.train.norms is not Freezing.frozen
    of_residual = (3 + 2 * norms_trained) * s.hidden
    of_attention = 2 * (s.queries + s.keys)
    of_experts = active * ((2 + weights_trained) * s.hidden + (3 + weights_trained) * s.width)
    if weights_trained and stage.train.experts is Freezing.lora:
        of_experts += active * 3 * s.rank
        if config.retrain.lora.dropout > 0:
            of_experts += active * (2 * s.hidden + s.width)
    layer = tokens * (residual * of_residual + compute * (of_attention + of_experts))
    working = tokens * compute * active * (3 * s.width + 3 * s.hidden)
    if config.trainer.gradient_checkpointing:
        return s.layers * tokens * residual * s.hidden + layer + working
    return s.layers * layer + working


def export(job: Job) -> Memory:
    """Writing the model, reading it back to the host and comparing."""
    s = job.shapes
    if job.streamed:  # the largest tensor is read back to be compared, and was read to be copied
        largest = max(s.vocabulary * s.hidden, s.hidden * s.width)
        parts = {
            "one layer's experts": float(job.weight * s.experts * s.expert),
            "a shard": float(max(SHARD_BYTES, job.exported_weight * largest)),
            "tensors read": float(2 * job.exported_weight * largest),
        }
        return _memory(job, {}, parts)
    copy = float(job.weight * (s.total + s.biases))
    if s.bias:
        return _memory(job, _both(job, exported=True))
    return _memory(job, _both(job, exported=True), {"in the files' layout": copy, "read back": copy})
