"""What fills the memory in each stage, as this implementation goes about it.

``rest`` is what weights and activations rest in: the device's memory, or the host's where the run is on CPUs.

Shapes: L layers, D hidden width, F FFN channels, W channels kept, E experts, G groups, V vocabulary, n tokens of one pass.
"""

from dataclasses import dataclass, field

from dive.config import SHARD_BYTES, ExpertsBy, Freezing, StageConfig, Storage, Strategy
from dive.plan import construction
from dive.plan.job import BYTES, Job
from dive.plan.parameters import trained

PROCESS = 0.55e9
"""Bytes of host memory of a process that has imported everything, before it loads a model."""
RETAINED = 0.15e9
"""Bytes that the C library keeps of what earlier stages gave back; measured, and the same for small and large models."""
SCATTERED = 0.1
"""Of what comes and goes in training on a CPU, what the C library loses between pieces; measured, on models of 4 to 135 M."""
CONTEXT = 0.6e9
"""Bytes of device memory that CUDA and its libraries take for themselves."""
LOSS_CHUNK = 2**20
"""Of :mod:`dive.retrain.loss`, which the plan does not import: it imports torch."""

GENERATED_ROWS = 64
"""Of :mod:`dive.calibration_domains.generated`, which imports torch too."""


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


def _together(job: Job, found: Memory, *shared: str) -> Memory:
    """The same of all processes of one machine: each has its own of everything on the host, but for what all share out."""
    devices, nodes = job.config.trainer.devices, job.config.trainer.num_nodes
    several = f" × {devices} processes" if devices > 1 else ""
    found.host = {
        name if name in shared else f"{name}{several}": size / nodes if name in shared else size * devices
        for name, size in found.host.items()
    }
    return found


def dequantising(job: Job) -> Memory:
    """The mapped file stays in memory where there is room, which is not counted."""
    s = job.shapes
    largest = max(s.vocabulary * s.hidden, s.hidden * s.channels)
    shard = min(float(s.dense * job.weight), float(max(SHARD_BYTES, job.weight * largest)))
    return _memory(job, {}, {"a shard": shard, "a tensor in float32, twice": 8.0 * largest}, first=True)


def generating(job: Job, rows: int) -> Memory:
    """Sequences that the dense model writes: keys and values, copied as they grow, and logits."""
    s = job.shapes
    cache = 2.0 * rows * job.config.calibration_domains.length * s.layers * 2 * s.keys * job.weight
    rest = {"dense model": float(job.weight * s.dense), "keys and values": cache, "logits": 16.0 * rows * s.vocabulary}
    return _memory(job, rest, first=True)


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


def calibration(job: Job, *, sequences: int, length: int) -> Memory:
    """One pass of the dense model over so many sequences of so many tokens of all domains, layer after layer."""
    s, domains = job.shapes, job.config.calibration_domains
    tokens = domains.batch * length
    statistics = job.domains * s.layers * s.channels * 16
    rest = {"dense model": dense_model(job), "activations": dense_layer(job, tokens) + tokens * _extra(job)}
    host = {"hidden states": _hidden(job, sequences * length), "statistics": float(statistics)}
    return _together(job, _memory(job, rest, host, first=True), "hidden states")


def _extra(job: Job) -> float:
    """Bytes a token that the statistics add: channels in float32."""
    return 0.0 if job.weight == 4 else 4.0 * job.shapes.channels


def _hidden(job: Job, tokens: int) -> float:
    """Hidden states of all calibration tokens between two layers, on the host."""
    return float(tokens * job.shapes.hidden * job.weight)


def mining(job: Job) -> Memory:
    """The dense model pruned by masks, on every domain's text."""
    s, domains = job.shapes, job.config.calibration_domains
    tokens = min(domains.batch, job.config.affinity.samples) * domains.length
    masks = job.domains * s.layers * s.channels * (1 + 16)
    layer = dense_layer(job, tokens) + tokens * job.weight * s.channels
    rest = {"dense model": float(job.weight * s.dense)} | _pass(job, layer, tokens, domains.length)
    return _together(job, _memory(job, rest, {"masks and statistics": float(masks)}, first=True))


def _pass(job: Job, layer: float, tokens: int, length: int) -> dict[str, float]:
    """A forward pass that is measured: a layer's activations, or later all logits and one window's softmax in float32.

    Args:
        layer: bytes of the activations.
        length: tokens of a window.
    """
    s = job.shapes
    softmax = length * s.vocabulary * (4 if job.weight == 4 else 8)  # a copy in float32 before it
    logits = tokens * (s.vocabulary + 2 * s.hidden) * job.weight + softmax
    return {"activations": layer} if layer > logits else {"logits": float(logits)}


def building(job: Job, *, experts: int, groups: int, sequences: int, refined: construction.Refinement | None) -> Memory:
    """A pass over the calibration tokens, and one layer's experts at a time."""
    s, domains, moe = job.shapes, job.config.calibration_domains, job.config.moe
    tokens = domains.batch * domains.length
    sums = (groups + 2) * construction.moment_bytes(s) if job.refits else 0  # two more while one is added
    sums *= 2 if s.shared_width and experts > 1 else 1  # again, of the channels that the shared expert leaves
    sampled = min(moe.distillation.tokens, sequences * domains.length) if moe.samples_inputs and experts > 1 else 0
    layer = experts * s.expert * job.weight
    solve = construction.solve_bytes(s) - 2 * construction.moment_bytes(s) if job.refits else 0
    if job.eliminates:
        solve = max(solve, construction.eliminate_bytes(s))
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
    host = {"hidden states": _hidden(job, sequences * job.config.calibration_domains.length)}
    if refined is not None:
        rest["second moments"] = 0.0  # of one expert at a time, and counted there
        clustering = 2 * construction.kmeans_sample(s, sequences * domains.length) if job.clusters_tokens else 0
        rest["refinement"] = float(max(construction.refine_device_bytes(s, refined), clustering))
        host["refinement"] = float(construction.refine_host_bytes(s, sequences * domains.length, job.weight))
        host["refinement"] += 4.0 * sequences * domains.length * s.hidden if s.shared_width else 0.0  # targets again
    return _together(job, _memory(job, rest, host, first=job.streamed), "hidden states", "refinement")


def evaluation(job: Job) -> Memory:
    """The Mixture-of-Experts beside the dense model, which stays loaded; weights reach a GPU by way of the host."""
    s, config = job.shapes, job.config
    passes = [(min(config.eval.batch, windows) * length, length) for windows, length in job.evaluation_windows]
    # The harness takes the softmax of a whole pass.
    passes += [(config.eval.batch * length, config.eval.batch * length) for _, length in job.tasks]
    largest = [
        _pass(job, max(dense_layer(job, tokens), sparse_layer(job, tokens, s.top_k)), tokens, length)
        for tokens, length in passes
    ]
    rest = max(largest, key=lambda item: sum(item.values()))
    # Of the dense model all at once; of the experts two layers', or what was trained.
    kept = sum(trained(s, [stage.train for stage in config.retrain.stages.values()]).values())
    loading = {"loading": float(max(2 * s.experts * s.expert * job.weight, kept * job.trained_weight))}
    if job.on_gpu:
        loading["loading"] = max(loading["loading"], float(job.weight * s.dense))
        return _together(job, _memory(job, _both(job) | rest, loading))
    largest_part = rest if sum(rest.values()) > sum(loading.values()) else loading
    return _together(job, _memory(job, _both(job) | largest_part))


def _both(job: Job, stage: StageConfig | None = None, *, exported: bool = False) -> dict[str, float]:
    """The dense model and its Mixture-of-Experts, as the latter rests in a stage of training, in evaluation or in the export."""
    s, moe, config = job.shapes, job.config.moe, job.config
    found = {"dense model": float(job.weight * s.dense)}
    indexed = config.retrain.storage is Storage.indexed and not exported
    own = s.total + s.biases
    if indexed:
        slices = moe.construction in ("plain", "upcycle") and not job.refits and s.renormalised
        own -= s.sparse * s.experts * (s.expert if slices else s.expert * 2 // 3)
    whole = config.trainer.strategy in (Strategy.single, Strategy.ddp)
    if stage is not None and (
        indexed or (stage.teacher.wanted and whole)
    ):  # what it leaves frozen is the dense model's
        own -= s.layers * s.attention if stage.train.attention is not Freezing.full else 0
        own -= s.kept * s.ffn
        own -= s.vocabulary * s.hidden if stage.train.embeddings is not Freezing.full else 0
        own -= s.vocabulary * s.hidden if stage.train.head is not Freezing.full and not s.tied else 0
    found["Mixture-of-Experts"] = float(job.weight * own)
    if indexed:
        found["indices"] = 8.0 * s.sparse * s.experts * s.width
        found["one layer's gathered experts"] = float(job.weight * s.experts * s.expert // 3)
    return found


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
    models = _both(job, stage)
    rest = models | {
        "adapters": float(extra * job.trained_weight + masters * (4 - job.weight)),
        "Adam": float(2 * learned * job.trained_weight),
    }
    # Gradients come as activations go, and go before the next pass.
    forward = saved_activations(job, stage, tokens) | _loss(job, stage, tokens)
    backward = {"gradients": float(learned * job.trained_weight)}
    if config.trainer.gradient_checkpointing:
        backward |= saved_activations(job, stage, tokens)
    rest |= forward if sum(forward.values()) > sum(backward.values()) else backward
    compute = BYTES[job.training_dtype]
    if compute != job.weight:
        rest["weights cast"] = float(compute * s.total)
    found = _memory(job, rest)
    if not job.on_gpu:
        found.host["allocator"] += SCATTERED * sum(size for name, size in rest.items() if name not in models)
    return _together(job, found)


def _loss(job: Job, stage: StageConfig, tokens: int) -> dict[str, float]:
    """Logits, which their gradients are written over, the softmaxes of a chunk of them, and what the teacher adds."""
    s = job.shapes
    compute = BYTES[job.training_dtype]
    chunk = min(LOSS_CHUNK, job.config.retrain.length * s.vocabulary)
    parts = {"logits": float(tokens * s.vocabulary * compute + chunk * 4 * (6 if stage.teacher.logits else 3))}
    if stage.teacher.wanted:
        hidden = (s.layers + 1) * s.hidden * tokens * (job.weight + 4) if stage.teacher.hidden else 0  # and distances
        parts["teacher"] = float(hidden + max(dense_layer(job, tokens), tokens * s.vocabulary * job.weight))
    return parts


def saved_activations(job: Job, stage: StageConfig, tokens: int) -> dict[str, float]:
    """What the forward pass keeps for the backward pass, in bytes; with checkpointing layers' inputs, and one layer's.

    Norms keep their inputs in the residual stream's type. A router and a block of experts keep what is listed here.
    """
    s, config = job.shapes, job.config
    compute = BYTES[job.training_dtype]
    residual = max(compute, job.trained_weight)
    active = stage.active(experts=s.experts, top_k=s.top_k)
    weights_trained = stage.train.experts is not Freezing.frozen
    adapted = stage.train.experts is Freezing.lora
    dropping = adapted and config.retrain.lora.dropout > 0
    norms_trained = stage.train.norms is not Freezing.frozen
    of_residual = (3 + 2 * norms_trained) * s.hidden
    of_attention = 2 * (s.queries + s.keys)
    by = _experts_by(job, stage)
    outputs = 2 if by in (ExpertsBy.ours, ExpertsBy.eager) else 1  # before and after their gates
    of_experts = active * ((outputs + weights_trained) * s.hidden + (3 + weights_trained) * s.width)
    if by is ExpertsBy.batched_mm:
        of_experts += active * s.expert  # every token's own copy of its experts' weights
    of_experts += (3 + weights_trained) * s.shared_width
    if adapted:
        of_experts += active * 3 * s.rank
    if dropping:
        of_experts += active * (2 * s.hidden + s.width)
    layer = tokens * (residual * of_residual + compute * (of_attention + of_experts))
    kept = tokens * (residual * of_residual + compute * (of_attention + 3 * s.channels)) if s.kept else 0.0
    if config.trainer.gradient_checkpointing:
        return {"activations": float(s.layers * tokens * residual * s.hidden + max(layer, kept))}
    return {"activations": float(s.sparse * layer + s.kept * kept)}


def _experts_by(job: Job, stage: StageConfig) -> ExpertsBy:
    """What :mod:`dive.moe.implementation` chooses; adapters of any stage count, which stay in all after it."""
    config, mixed = job.config, job.config.trainer.precision.endswith("-mixed")
    if config.trainer.experts is not ExpertsBy.auto:
        return config.trainer.experts
    adapted = any(each.train.experts is Freezing.lora for each in (stage, *config.retrain.stages.values()))
    cast = mixed and (stage.train.experts is Freezing.full or job.dtype != job.training_dtype)
    ours = adapted or cast or job.shapes.bias or config.retrain.storage is Storage.indexed
    return ExpertsBy.ours if ours else ExpertsBy.grouped_mm


def export(job: Job) -> Memory:
    """Writing the model, reading it back to the host and comparing."""
    s = job.shapes
    if job.streamed:  # the largest tensor is read back to be compared, and was read to be copied
        widest = max(s.width, s.shared_width, s.channels if s.kept else 0)
        largest = max(s.vocabulary, widest) * s.hidden
        parts = {
            "one layer's experts": float(job.weight * s.experts * s.expert),
            "a shard": float(max(SHARD_BYTES, job.exported_weight * largest)),
            "tensors read": float(2 * job.exported_weight * largest),
        }
        return _memory(job, {}, parts)
    copy = float(job.weight * (s.total + s.biases))
    if s.bias:
        return _memory(job, _both(job, exported=True))
    layout = copy + job.weight * s.tied_head
    return _memory(job, _both(job, exported=True), {"in the files' layout": layout, "read back": copy})
