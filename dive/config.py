"""The typed schema of the configuration, a dataclass a group, and every check that needs no model and no data.

Each dataclass mirrors one folder of ``conf/``. A check that fails raises :class:`UserError` and names the override to
change; it runs when the composed configuration is turned into these objects, before anything is loaded.
"""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from dive.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raise :class:`UserError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


# --------------------------------------------------------------------------------------------------------------- model

SHARD_BYTES = 1 << 30
"""Size of the shards of a streamed export. Here, as the plan counts with it and imports no torch."""


class Dtype(Enum):
    """Element type of the weights in memory."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Load(Enum):
    """Where the weights of the dense model are while experts are built."""

    full = "full"
    """All in memory."""
    streamed = "streamed"
    """On disk; one decoder layer at a time is read."""


@dataclass(slots=True, kw_only=True)
class ArchitectureConfig:
    """The figures of a dense model's config.json that its cost follows from, under the names they have there.

    The presets of hub models hold them, so that a run can be planned before anything is downloaded; they are compared with the
    model's own once it is at hand.
    """

    model_type: str = MISSING
    hidden_size: int = MISSING
    """D"""
    intermediate_size: int = MISSING
    """F, channels of each FFN."""
    num_hidden_layers: int = MISSING
    num_attention_heads: int = MISSING
    num_key_value_heads: int = MISSING
    head_dim: int = MISSING
    vocab_size: int = MISSING
    max_position_embeddings: int = MISSING
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"
    """Element type of the checkpoint, which ``model.dtype=auto`` takes."""


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """The dense model to start from."""

    name: str = MISSING
    """Short name for logs and the model card."""
    path: str = MISSING
    """Directory, hub id, or ``embedded`` for the model that comes with the package."""
    revision: str | None = None
    """Commit, branch or tag on the hub; pin it for numbers that can be repeated."""
    dtype: Dtype = Dtype.float32
    """Element type of the weights; bfloat16 for a GPU. ``auto`` takes the checkpoint's own."""
    device: str = "auto"
    """Where calibration, mining and evaluation run: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``."""
    architecture: ArchitectureConfig | None = None
    """For planning without the model at hand; null reads its config.json."""
    load: Load = Load.full
    """``streamed`` calibrates, builds experts and exports a layer at a time; nothing is evaluated or retrained."""
    export_dtype: Dtype | None = None
    """Element type of the export; ``dtype`` if null, the dense checkpoint's own if ``auto``."""


# ------------------------------------------------------------------------------------------------- calibration_domains


class TextSource(Enum):
    """Where texts come from."""

    embedded = "embedded"
    hub = "hub"
    local = "local"


@dataclass(slots=True, kw_only=True)
class HubTextConfig:
    """One text data set on the hub, read through ``datasets``."""

    path: str = MISSING
    """Hub id, or a directory with a data set's files."""
    config: str | None = None
    """Configuration (subset) name."""
    revision: str | None = None
    """Commit, branch or tag; ``refs/convert/parquet`` where the original needs a loading script."""
    data_files: str | None = None
    """Files inside the repository to read for ``train`` instead of the split's own (for very large sets)."""
    test_data_files: str | None = None
    """The same for ``test``."""
    train: str = "train"
    """Split for calibration and retraining; ``train[1000:]`` leaves its first 1000 rows to ``test``."""
    test: str | None = None
    """Split for evaluation; none if the set has no public one."""
    template: str = "{text}"
    """What a row becomes: text in which each field in braces is replaced by a value of the row.

    - ``{question}``: a column; ``{answers[text]}``: a field of a column that is a structure.
    - ``{questions[0]}``: an entry of a list, counted from 0.
    - ``{endings[label]}``: the entry whose position the column ``label`` holds, as a number or as a letter (A is
      the first); ``{endings[label-1]}`` if that column counts from 1.
    - ``{sol1|sol2[label]}``: one of several columns, chosen in the same way.
    - ``{contexts}``: a list, joined by blanks; ``{contexts:, }``: by what follows the colon.

    ``{{`` and ``}}`` are braces. A row that lacks one of the values (null, an empty list, a hidden answer) is left out.
    """
    streaming: bool = False
    """Read from the start without downloading the whole set."""


@dataclass(slots=True, kw_only=True)
class CalibrationDomainsConfig:
    """The calibration domains and how much text of each is used (METHOD: 1024 sequences of 256 tokens)."""

    source: TextSource = MISSING
    path: str | None = None
    """``local`` only: directory with ``<domain>/{train,test}.jsonl|txt|parquet``."""
    text_field: str = "text"
    """``local`` only: name of the text column."""
    domains: list[str] | None = None
    """Names to use; all that the source has if null."""
    hub: dict[str, HubTextConfig] = field(default_factory=dict)
    """``hub`` only: the data set of each domain."""
    samples: int = 32
    """Calibration sequences per domain."""
    length: int = 256
    """Tokens per calibration sequence."""
    group_samples: int | None = None
    """Calibration sequences of a group, split evenly over its domains, as in the paper; all of theirs if null. Where experts
    do not begin with groups, so many for each expert, of all domains."""
    repeat: bool = False
    """Crop the same documents again where a domain has fewer tokens than are asked for, instead of refusing it."""
    batch: int = 16
    """Sequences per forward pass."""

    def __post_init__(self) -> None:
        require(
            self.group_samples is None or self.group_samples > 0,
            f"calibration_domains.group_samples ({self.group_samples}) must be positive, or null",
        )
        require(self.samples > 0, f"calibration_domains.samples ({self.samples}) must be positive")
        require(self.length > 1, f"calibration_domains.length ({self.length}) must be at least 2")
        require(self.batch > 0, f"calibration_domains.batch ({self.batch}) must be positive")
        if self.source is TextSource.local:
            require(
                self.path is not None,
                "calibration_domains.path is needed with calibration_domains=local: a directory with <domain>/train.jsonl",
            )
        if self.source is TextSource.hub:
            require(bool(self.hub), "calibration_domains.hub names no data set; calibration_domains=paper has 24")
            unknown = sorted(set(self.domains or []) - set(self.hub))
            require(not unknown, f"calibration_domains.domains: {unknown} not among {sorted(self.hub)}")
        if self.domains is not None:
            require(bool(self.domains), "calibration_domains.domains is empty; null takes all")
            require(
                len(set(self.domains)) == len(self.domains),
                "calibration_domains.domains names a domain twice",
            )


# ------------------------------------------------------------------------------------------------------------- pruning


class Metric(Enum):
    """Importance score of an FFN channel."""

    wifv = "wifv"
    ifv = "ifv"
    wifn = "wifn"
    obs = "obs"
    taylor = "taylor"
    magnitude = "magnitude"
    random = "random"


class Compensation(Enum):
    """What makes up for the channels that were removed."""

    least_squares = "least_squares"
    bias = "bias"
    none = "none"


@dataclass(slots=True, kw_only=True)
class PruningConfig:
    """How an FFN becomes narrower."""

    metric: Metric = Metric.wifv
    ratio: float = 0.75
    """Share of every FFN's channels that is removed, in (0, 1)."""
    compensation: Compensation = Compensation.least_squares
    ridge: float | None = 0.01
    """Ridge of least squares and of ``metric=obs``, as a share of the mean channel energy; keeps rare channels from
    over-fitting. Null chooses one for every expert by its error on a quarter of the calibration sequences."""
    obs_block: int = 16
    """``metric=obs`` only: channels removed at a time; 1 is the exact greedy order."""
    width_multiple: int = 8
    """The kept width is rounded to this multiple. Grouped matrix products need 8 (16 bytes of bfloat16); 32 is faster, 256
    suits llama.cpp's k-quants."""

    def __post_init__(self) -> None:
        require(0.0 < self.ratio < 1.0, f"pruning.ratio ({self.ratio}) must lie strictly between 0 and 1")
        require(
            self.ridge is None or self.ridge >= 0.0,
            f"pruning.ridge ({self.ridge}) must not be negative, or null to choose one",
        )
        require(self.obs_block >= 1, f"pruning.obs_block ({self.obs_block}) must be at least 1")
        require(
            self.metric is not Metric.obs or self.compensation is Compensation.least_squares,
            f"pruning.metric=obs removes channels while it refits the others: pruning.compensation={self.compensation.value} "
            "contradicts it; set pruning.metric=wifv as well, or pruning.compensation=least_squares",
        )
        require(self.width_multiple >= 1, f"pruning.width_multiple ({self.width_multiple}) must be at least 1")

    @property
    def score_metric(self) -> Metric:
        """Score where one is needed channel by channel, or for single domains: ``obs`` has none, ``wifv`` stands in."""
        return Metric.wifv if self.metric is Metric.obs else self.metric

    def width(self, channels: int) -> int:
        """Channels kept of ``channels``: (1 - ratio) · channels, rounded to the nearest multiple.

        Raises:
            UserError: the multiple leaves nothing, or everything.
        """
        multiple = self.width_multiple
        width = round(channels * (1.0 - self.ratio) / multiple) * multiple
        require(
            0 < width < channels,
            f"pruning.width_multiple ({multiple}) and pruning.ratio ({self.ratio}) keep {width} of {channels} channels; "
            "lower the multiple or change the ratio",
        )
        return width


# ------------------------------------------------------------------------------------------------------------ affinity


class Grouping(Enum):
    """How domains are grouped, one group an expert."""

    mined = "mined"
    published = "published"
    random = "random"
    given = "given"


class Measure(Enum):
    """What tells how alike two domains are."""

    perplexity = "perplexity"
    importance = "importance"
    mask_overlap = "mask_overlap"


class Linkage(Enum):
    """Rule of the hierarchical clustering (``scipy.cluster.hierarchy``)."""

    average = "average"
    complete = "complete"
    single = "single"


@dataclass(slots=True, kw_only=True)
class AffinityConfig:
    """How the calibration domains become groups."""

    grouping: Grouping = Grouping.mined
    measure: Measure = Measure.perplexity
    """``mined`` only. ``perplexity``: of each pruned model on every domain, as in the paper; domains² evaluations.
    ``importance``: rank correlation of the channels' importance; ``mask_overlap``: channels kept in common. Both come from the
    calibration statistics alone."""
    linkage: Linkage = Linkage.complete
    """``mined`` only. The paper does not name its own; average linkage tends to one large group and many single domains,
    complete linkage to groups of like size, as the published ones are."""
    samples: int = 8
    """``mined`` only: sequences per domain that measure each pruned model; drawn apart from the calibration ones."""
    groups: list[list[str]] | None = None
    """``published`` and ``given``: the domains of each expert."""

    def __post_init__(self) -> None:
        require(self.samples > 0, f"affinity.samples ({self.samples}) must be positive")
        if self.grouping in (Grouping.given, Grouping.published):
            require(
                bool(self.groups),
                "affinity.groups is needed: a list of lists of domain names, one list an expert",
            )
            assert self.groups is not None
            flat = [domain for group in self.groups for domain in group]
            require(all(self.groups), "affinity.groups has an empty group")
            twice = sorted({domain for domain in flat if flat.count(domain) > 1})
            require(not twice, f"affinity.groups names {twice} twice")


# ----------------------------------------------------------------------------------------------------------------- moe


class Construction(Enum):
    """Where the experts come from."""

    dive = "dive"
    random_split = "random_split"
    coactivation = "coactivation"
    upcycle = "upcycle"


class RouterInit(Enum):
    """How the routers start."""

    random = "random"
    distilled = "distilled"


@dataclass(slots=True, kw_only=True)
class DistillationConfig:
    """Fit of each router to the expert with the smallest error against the dense FFN."""

    tokens: int = 32768
    """Calibration tokens per layer."""
    steps: int = 900
    """Optimiser steps per layer."""
    batch: int = 4096
    """Tokens per step."""
    learning_rate: float = 0.05
    temperature: float = 0.1
    """Of the first steps' soft target softmax(-error / (temperature · mean error))."""

    def __post_init__(self) -> None:
        for name in ("tokens", "steps", "batch", "learning_rate", "temperature"):
            value = getattr(self, name)
            require(value > 0, f"moe.distillation.{name} ({value}) must be positive")


class Start(Enum):
    """Tokens that each expert is first derived from."""

    groups = "groups"
    kmeans = "kmeans"
    random = "random"


@dataclass(slots=True, kw_only=True)
class RefinementConfig:
    """Experts refined on calibration tokens, layer by layer; all off is one expert a group of domains, as in the paper."""

    start: Start = Start.groups
    """``groups`` of domains; ``kmeans`` on the layer's FFN inputs, or ``random``: tokens whatever their domain."""
    rounds: int = 0
    """Times that tokens go to the expert the router picks, and experts are derived anew from their tokens: k-means whose
    centroids are pruned FFNs."""
    sequential: bool = False
    """Take each layer's tokens through the already rebuilt layers before it."""
    correction: float = 0.5
    """``sequential`` only: share of the earlier layers' error that a layer's target makes up for, in [0, 1]."""
    steps: int = 0
    """Gradient steps a layer on experts and router together, against the dense FFN's output."""
    batch: int = 4096
    """Tokens per step."""
    learning_rate: float = 1e-2
    """Of the experts, Adam."""
    router_learning_rate: float = 2e-2
    balance: float = 0.1
    """Weight of the penalty on experts with more load than ``max_load``."""
    max_load: float = 1.5
    """Load of an expert over the mean load, from which it is penalised."""

    @property
    def needs_tokens(self) -> bool:
        """Whether experts follow from the tokens themselves, and not from statistics of domains alone."""
        return self.rounds > 0 or self.steps > 0 or self.sequential or self.start is not Start.groups

    def __post_init__(self) -> None:
        for name in ("rounds", "steps", "balance"):
            value = getattr(self, name)
            require(value >= 0, f"moe.refinement.{name} ({value}) must not be negative")
        for name in ("batch", "learning_rate", "router_learning_rate"):
            value = getattr(self, name)
            require(value > 0, f"moe.refinement.{name} ({value}) must be positive")
        require(
            0.0 <= self.correction <= 1.0, f"moe.refinement.correction ({self.correction}) must lie between 0 and 1"
        )
        require(self.max_load >= 1.0, f"moe.refinement.max_load ({self.max_load}) must be at least 1")


class Storage(Enum):
    """What experts rest in while they are retrained."""

    materialised = "materialised"
    shared = "shared"


@dataclass(slots=True, kw_only=True)
class MoEConfig:
    """The Mixture-of-Experts that is built."""

    experts: int = 8
    top_k: int = 1
    construction: Construction = Construction.dive
    shared: float = 0.0
    """Share of every expert's width that goes to channels which all experts have, in [0, 1). ``dive``: those most important
    to all text together; ``coactivation``: those most often active. The gates of the chosen experts sum to one, so a channel
    that stands in each of them is always on."""
    active_channels: int = 10
    """``coactivation`` only: channels counted as active on a token (CMoE's K_a)."""
    router_init: RouterInit = RouterInit.distilled
    noise: float = 0.0
    """Scale of the learned router noise in training; the paper's is 0.0005. 0 adds none, and no noise weights."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    refinement: RefinementConfig = field(default_factory=RefinementConfig)
    storage: Storage = Storage.materialised
    """``shared``: while retraining, experts are index sets into the dense model's FFNs, and adapters. Down projections that
    least squares refitted are each expert's own. The export is the same."""

    @property
    def needs_groups(self) -> bool:
        """Whether experts begin with groups of domains."""
        return self.construction is Construction.dive and self.experts > 1 and self.refinement.start is Start.groups

    def __post_init__(self) -> None:
        require(self.experts >= 1, f"moe.experts ({self.experts}) must be at least 1")
        require(self.top_k >= 1, f"moe.top_k ({self.top_k}) must be at least 1")
        require(
            self.top_k <= self.experts,
            f"moe.top_k ({self.top_k}) must not exceed moe.experts ({self.experts})",
        )
        require(
            self.construction is not Construction.upcycle or self.router_init is RouterInit.random,
            "moe.router_init=distilled has nothing to learn from identical experts; set moe.router_init=random, or moe=upcycle",
        )
        require(0.0 <= self.shared < 1.0, f"moe.shared ({self.shared}) must lie in [0, 1)")
        require(
            self.shared == 0.0 or self.construction in (Construction.dive, Construction.coactivation),
            f"moe.shared ({self.shared}) goes with moe.construction=dive or coactivation; set moe.shared=0",
        )
        require(self.active_channels >= 1, f"moe.active_channels ({self.active_channels}) must be at least 1")
        require(self.noise >= 0.0, f"moe.noise ({self.noise}) must not be negative")
        refined = self.refinement.needs_tokens
        require(
            not refined or self.shared == 0.0,
            f"moe.shared ({self.shared}) and moe.refinement contradict each other; set moe=plain or moe.shared=0",
        )
        require(
            not refined or self.construction is Construction.dive,
            f"moe.refinement goes with moe.construction=dive, not {self.construction.value}; set moe={self.construction.value}",
        )
        require(
            not refined or self.router_init is RouterInit.distilled or self.experts == 1,
            "moe.refinement needs routers that know their experts: set moe.router_init=distilled, or moe=plain",
        )
        require(
            self.storage is Storage.materialised or self.refinement.steps == 0,
            "moe.storage=shared: moe.refinement.steps change the experts' gate and up projections, which are then no longer the "
            "dense model's; set moe.refinement.steps=0, moe=plain, or moe.storage=materialised",
        )


# ------------------------------------------------------------------------------------------------------------- retrain


class Mode(Enum):
    """Which experts a stage runs: all of them, or the selected ones."""

    dense = "dense"
    sparse = "sparse"


class Freezing(Enum):
    """What happens to a part of the model in a stage."""

    frozen = "frozen"
    full = "full"
    lora = "lora"


class Gate(Enum):
    """Weight of the selected experts in sparse training; at evaluation all are the renormalised one of the stock class."""

    renormalised = "renormalised"
    straight_through = "straight_through"
    switch = "switch"


class Schedule(Enum):
    """Learning rate over a stage."""

    constant = "constant"
    cosine = "cosine"


@dataclass(slots=True, kw_only=True)
class FreezingConfig:
    """The freezing policy: what is trained, and how."""

    router: Freezing = Freezing.frozen
    experts: Freezing = Freezing.frozen
    norms: Freezing = Freezing.frozen
    attention: Freezing = Freezing.frozen
    embeddings: Freezing = Freezing.frozen
    head: Freezing = Freezing.frozen

    def __post_init__(self) -> None:
        for part in ("router", "norms"):
            require(
                getattr(self, part) is not Freezing.lora,
                f"retrain.stages.*.train.{part} is a vector or a few rows: lora makes no sense there, choose frozen or full",
            )


@dataclass(slots=True, kw_only=True)
class TeacherConfig:
    """What a stage learns from the dense model beside the text."""

    logits: float = 0.0
    """Share of the loss that is the Kullback-Leibler divergence from the dense model's next-token distribution, in [0, 1];
    the rest is cross-entropy."""
    temperature: float = 1.0
    """Of both distributions."""
    top_k: int | None = None
    """Compare the dense model's k likeliest tokens, and all others as one; null compares every token."""
    hidden: float = 0.0
    """Weight of the relative squared distance between both models' hidden states, averaged over layers."""

    @property
    def wanted(self) -> bool:
        """Whether the dense model is needed at all."""
        return self.logits > 0 or self.hidden > 0


@dataclass(slots=True, kw_only=True)
class StageConfig:
    """One stage of retraining."""

    mode: Mode = Mode.sparse
    gate: Gate = Gate.renormalised
    """Sparse mode only. ``straight_through``: the same values with the gradient of the selected probabilities, so that
    top-1 routers learn; ``switch``: times the probability itself, whose exponent falls from 1 to 0 over the stage."""
    balance: float = 0.0
    """Weight of the penalty on experts whose load in a forward pass exceeds ``max_load``."""
    max_load: float = 1.5
    """Load of an expert over the mean load, from which it is penalised."""
    z_loss: float = 0.0
    """Weight of the mean squared log-sum-exp of the router's logits (ST-MoE, arXiv 2202.08906)."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    temperature: float = 1.0
    """Dense mode only: the gate is softmax(logits / temperature)."""
    train: FreezingConfig = field(default_factory=FreezingConfig)
    learning_rate: float = 1e-4
    schedule: Schedule = Schedule.constant
    warmup: float = 0.0
    """Share of the steps over which the learning rate rises from 0."""
    floor: float = 0.0
    """Cosine only: final learning rate as a share of the peak."""
    weight_decay: float = 0.0
    tokens: int = MISSING
    """Tokens of the whole stage, over all devices; rounded up to whole steps."""
    batch: int = 16
    """Sequences per optimiser step, over all devices and accumulation steps."""
    accumulation: int | None = None
    """Forward passes per optimiser step; trainer.accumulation if null."""


@dataclass(slots=True, kw_only=True)
class LoRAConfig:
    """Low-rank adaptation of the parts whose freezing is ``lora`` (METHOD: r 8, alpha 16, dropout 0.1)."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"retrain.lora.rank ({self.rank}) must be at least 1")
        require(0.0 <= self.dropout < 1.0, f"retrain.lora.dropout ({self.dropout}) must lie in [0, 1)")


class CorpusSource(Enum):
    """Retraining text."""

    domains = "domains"
    local = "local"
    hub = "hub"


@dataclass(slots=True, kw_only=True)
class CorpusConfig:
    """The retraining corpus."""

    source: CorpusSource = CorpusSource.domains
    """``domains``: the train splits of the calibration domains, evenly; ``local``: files; ``hub``: a data set."""
    path: str | None = None
    """``local`` only: a file or a directory of jsonl, txt or parquet files."""
    text_field: str = "text"
    """``local`` only: name of the text column."""
    hub: HubTextConfig = field(default_factory=lambda: HubTextConfig(path=""))
    """``hub`` only."""
    shuffle_buffer: int = 10_000
    """``hub`` only: documents held for shuffling the stream."""

    def __post_init__(self) -> None:
        if self.source is CorpusSource.local:
            require(self.path is not None, "retrain.corpus.path is needed with retrain.corpus.source=local")
        if self.source is CorpusSource.hub:
            require(self.hub.path != "", "retrain.corpus.hub.path is needed with retrain.corpus.source=hub")


@dataclass(slots=True, kw_only=True)
class RetrainConfig:
    """Retraining: stages in the order of their names' appearance."""

    stages: dict[str, StageConfig] = field(default_factory=dict)
    length: int = 256
    """Tokens per training sequence."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    resume: str | None = "last"
    """``last`` goes on from an interrupted stage's last checkpoint, a path from that checkpoint, null starts anew."""
    checkpoint_every: int = 100
    """Optimiser steps between checkpoints of a running stage."""
    log_every: int = 4
    """Optimiser steps between logged values."""

    def __post_init__(self) -> None:
        require(self.length > 1, f"retrain.length ({self.length}) must be at least 2")
        require(self.checkpoint_every >= 1, "retrain.checkpoint_every must be at least 1")
        require(self.log_every >= 1, "retrain.log_every must be at least 1")
        for name, stage in self.stages.items():
            where = f"retrain.stages.{name}"
            require(name not in RESERVED_STAGES, f"{where}: the name is taken by the pipeline; rename the stage")
            require(stage.tokens > 0, f"{where}.tokens ({stage.tokens}) must be positive")
            require(stage.batch > 0, f"{where}.batch ({stage.batch}) must be positive")
            require(stage.learning_rate > 0, f"{where}.learning_rate ({stage.learning_rate}) must be positive")
            require(stage.temperature > 0, f"{where}.temperature ({stage.temperature}) must be positive")
            require(stage.balance >= 0, f"{where}.balance ({stage.balance}) must not be negative")
            require(stage.max_load >= 1, f"{where}.max_load ({stage.max_load}) must be at least 1")
            require(stage.z_loss >= 0, f"{where}.z_loss ({stage.z_loss}) must not be negative")
            teacher = stage.teacher
            require(0 <= teacher.logits <= 1, f"{where}.teacher.logits ({teacher.logits}) must lie between 0 and 1")
            require(teacher.temperature > 0, f"{where}.teacher.temperature ({teacher.temperature}) must be positive")
            require(teacher.hidden >= 0, f"{where}.teacher.hidden ({teacher.hidden}) must not be negative")
            require(
                teacher.top_k is None or teacher.top_k > 0, f"{where}.teacher.top_k ({teacher.top_k}) must be positive"
            )
            require(0 <= stage.warmup < 1, f"{where}.warmup ({stage.warmup}) must lie in [0, 1)")
            require(0 <= stage.floor <= 1, f"{where}.floor ({stage.floor}) must lie in [0, 1]")
            require(
                any(getattr(stage.train, part) is not Freezing.frozen for part in PARTS),
                f"{where}.train freezes everything; set one of {', '.join(PARTS)} to full or lora",
            )
            require(stage.accumulation is None or stage.accumulation > 0, f"{where}.accumulation must be positive")


RESERVED_STAGES = ("dense", "pruned", "reconstructed")
PARTS = ("router", "experts", "norms", "attention", "embeddings", "head")
"""Parts of the model that the freezing policy speaks of."""


# ---------------------------------------------------------------------------------------------------------------- eval


@dataclass(slots=True, kw_only=True)
class EvalSetConfig:
    """A named evaluation text beside the domains' own test texts."""

    source: TextSource = TextSource.local
    path: str | None = None
    """``local``: a jsonl, txt or parquet file; ``embedded``: the name of an embedded domain, whose test text is taken."""
    text_field: str = "text"
    hub: HubTextConfig | None = None
    """``hub``: its ``test`` split is read."""
    lengths: list[int] = field(default_factory=lambda: [1024, 2048])
    """Window lengths in tokens."""
    separator: str | None = "\n\n"
    """Joins the documents to one text before it is cut into windows; null leaves them apart."""


@dataclass(slots=True, kw_only=True)
class TaskConfig:
    """How one of ``eval.tasks`` is put to the model."""

    shots: int | None = None
    """Solved examples before each question; the task's own number (mostly none) if null."""
    limit: int | None = None
    """Questions, from the first (of a group such as mmlu: of each member); ``eval.task_limit`` if null."""
    metric: str | None = None
    """Shown in tables and averaged; the task's first if null. All are recorded."""


@dataclass(slots=True, kw_only=True)
class EvalConfig:
    """What is measured, and on how much text."""

    lengths: list[int] = field(default_factory=lambda: [256])
    """Window lengths in tokens on the domains' test texts; the headline mean is taken at the first."""
    windows: int | None = 12
    """Windows per set; all that the text fills if null."""
    batch: int = 16
    """Windows per forward pass."""
    allow_overlap: bool = False
    """Accept evaluation documents that stand in the training text as well."""
    generations: int = 6
    """Test texts that the dense model and the Mixture-of-Experts continue, to be read in the report."""
    generated_tokens: int = 32
    """Tokens of each continuation, at most half a window."""
    sets: dict[str, EvalSetConfig] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)
    """Tasks, groups or tags of lm-evaluation-harness, or of ``task_path``; results.json lists them in this order."""
    task_settings: dict[str, TaskConfig] = field(default_factory=dict)
    """By name of the task; what stands here of tasks that are not in ``tasks`` is left aside."""
    task_path: str | None = None
    """Directory of task YAMLs of your own, beside the harness's. What their ``!function`` names is run."""
    task_limit: int | None = None
    """Questions per task, from the first; all if null."""
    add_bos_token: bool | None = None
    """Whether prompts of tasks begin with the BOS token; as the tokenizer does by itself if null, the harness's default."""
    ngram: int = 13
    """Words of the n-grams by which evaluation text is looked for in the training text; 0 for not at all."""

    def __post_init__(self) -> None:
        require(bool(self.lengths), "eval.lengths is empty")
        require(all(length > 1 for length in self.lengths), "eval.lengths must be at least 2 tokens")
        require(self.windows is None or self.windows > 0, "eval.windows must be positive, or null for all")
        require(self.batch > 0, f"eval.batch ({self.batch}) must be positive")
        require(self.generations >= 0, f"eval.generations ({self.generations}) must not be negative")
        require(self.generated_tokens > 0, f"eval.generated_tokens ({self.generated_tokens}) must be positive")
        for name, entry in self.sets.items():
            where = f"eval.sets.{name}"
            require(bool(entry.lengths), f"{where}.lengths is empty")
            require(entry.source is TextSource.hub or entry.path is not None, f"{where}.path is needed")
            require(entry.source is not TextSource.hub or entry.hub is not None, f"{where}.hub is needed")
        require(self.ngram >= 0, f"eval.ngram ({self.ngram}) must not be negative")
        require(self.task_limit is None or self.task_limit > 0, "eval.task_limit must be positive, or null for all")
        twice = sorted({name for name in self.tasks if self.tasks.count(name) > 1})
        require(not twice, f"eval.tasks names {twice} twice")
        for name, settings in self.task_settings.items():
            where = f"eval.task_settings.{name}"
            require(settings.shots is None or settings.shots >= 0, f"{where}.shots must not be negative")
            require(settings.limit is None or settings.limit > 0, f"{where}.limit must be positive, or null for all")


# ------------------------------------------------------------------------------------------------------------- trainer


class Strategy(Enum):
    """Lightning strategy of retraining."""

    single = "single"
    ddp = "ddp"
    fsdp = "fsdp"
    fsdp2 = "fsdp2"


ACCELERATORS = ("cpu", "gpu", "cuda")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true")


@dataclass(slots=True, kw_only=True)
class TrainerConfig:
    """The hardware side of retraining."""

    accelerator: str = "cpu"
    devices: int = 1
    num_nodes: int = 1
    strategy: Strategy = Strategy.single
    precision: str = "32-true"
    """Lightning precision; ``bf16-mixed`` on a GPU keeps what is trained in float32, whatever ``model.dtype`` is."""
    gradient_checkpointing: bool = False
    accumulation: int = 1
    """Forward passes per optimiser step where a stage does not say."""
    gradient_clip: float | None = 1.0
    """Largest gradient norm; null for no clipping."""

    def __post_init__(self) -> None:
        require(
            self.accelerator in ACCELERATORS,
            f"trainer.accelerator ({self.accelerator}) is none of {', '.join(ACCELERATORS)}",
        )
        require(
            self.precision in PRECISIONS, f"trainer.precision ({self.precision}) is none of {', '.join(PRECISIONS)}"
        )
        require(
            self.gradient_clip is None or self.gradient_clip > 0,
            f"trainer.gradient_clip ({self.gradient_clip}) must be positive, or null for none",
        )
        require(self.devices >= 1, f"trainer.devices ({self.devices}) must be at least 1")
        require(self.num_nodes >= 1, f"trainer.num_nodes ({self.num_nodes}) must be at least 1")
        require(self.accumulation >= 1, f"trainer.accumulation ({self.accumulation}) must be at least 1")
        world = self.devices * self.num_nodes
        require(
            self.strategy is not Strategy.single or world == 1,
            f"trainer.devices ({self.devices}) needs a strategy: trainer=ddp, trainer=fsdp or trainer=fsdp2",
        )
        require(
            not (self.strategy is Strategy.fsdp and self.accelerator == "cpu"),
            "trainer=fsdp does not run on CPUs; trainer=fsdp2 does",
        )


# -------------------------------------------------------------------------------------------------------------- logger


@dataclass(slots=True, kw_only=True)
class CSVConfig:
    """metrics.csv in the run's directory."""


@dataclass(slots=True, kw_only=True)
class TensorBoardConfig:
    """Event files in the run's directory; needs the ``tensorboard`` extra."""


@dataclass(slots=True, kw_only=True)
class WandbConfig:
    """Weights & Biases; offline by itself where nobody is logged in."""

    project: str = "dive"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class LoggerConfig:
    """Loggers; choose with ``logger=[csv,wandb]``."""

    csv: CSVConfig | None = None
    tensorboard: TensorBoardConfig | None = None
    wandb: WandbConfig | None = None


# ---------------------------------------------------------------------------------------------------------------- plan


class PlanTable(Enum):
    """What ``python -m dive.plan`` prints."""

    stages = "stages"
    memory = "memory"
    construction = "construction"


@dataclass(slots=True, kw_only=True)
class DeviceConfig:
    """A device to estimate time and memory on."""

    bfloat16: float = MISSING
    """Peak of matrix products in bfloat16 or float16, FLOP/s, without sparsity."""
    float32: float = MISSING
    """The same in float32 (torch's default: without TF32)."""
    float64: float = MISSING
    """The same in float64, in which least squares is solved."""
    utilisation: float = MISSING
    """Share of these peaks that whole stages reach."""
    bandwidth: float = MISSING
    """Of its memory, bytes/s."""
    link: float = MISSING
    """Between it and the host's memory, bytes/s."""
    memory: float | None = None
    """Bytes; null for a CPU, which computes in the host's memory."""

    def __post_init__(self) -> None:
        for name in ("bfloat16", "float32", "float64", "bandwidth", "link"):
            require(getattr(self, name) > 0, f"plan.devices.*.{name} ({getattr(self, name)}) must be positive")
        require(0 < self.utilisation <= 1, f"plan.devices.*.utilisation ({self.utilisation}) must lie in (0, 1]")


@dataclass(slots=True, kw_only=True)
class PlanConfig:
    """What a run is planned for."""

    device: str = "auto"
    """One of ``devices``; ``auto`` is ``cpu`` where ``trainer.accelerator`` is, else ``h100``."""
    devices: dict[str, DeviceConfig] = field(default_factory=dict)
    table: PlanTable = PlanTable.stages
    """``stages``: what each costs; ``memory``: what fills it; ``construction``: what building the experts costs."""
    enforce: bool = True
    """Refuse a run that the plan says this machine has no room for."""
    windows: int = 300
    """Windows taken for granted of each evaluation text where ``eval.windows`` is null."""
    disk: float = 1e9
    """Of the disk, bytes/s."""

    def __post_init__(self) -> None:
        require(self.windows > 0, f"plan.windows ({self.windows}) must be positive")
        require(self.disk > 0, f"plan.disk ({self.disk}) must be positive")
        choices = ["auto", *self.devices]
        require(self.device in choices, f"plan.device ({self.device}) is none of {', '.join(choices)}")


# ---------------------------------------------------------------------------------------------------------- experiment


@dataclass(slots=True, kw_only=True)
class Config:
    """A whole experiment."""

    model: ModelConfig = field(default_factory=ModelConfig)
    calibration_domains: CalibrationDomainsConfig = field(default_factory=CalibrationDomainsConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    affinity: AffinityConfig = field(default_factory=AffinityConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    retrain: RetrainConfig = field(default_factory=RetrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    seed: int = 42
    store: str = "outputs/store"
    """Directory of the artifacts that runs share."""

    @property
    def mines(self) -> bool:
        """Whether groups are mined, which takes a calibration pass and the measure between domains."""
        return self.affinity.grouping is Grouping.mined and self.moe.needs_groups

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed ({self.seed}) must not be negative")
        require(
            not (self.pruning.compensation is Compensation.bias and self.moe.construction is not Construction.dive),
            "pruning.compensation=bias goes with moe.construction=dive alone; choose least_squares or none",
        )
        require(
            self.pruning.compensation is Compensation.least_squares or not self.moe.refinement.needs_tokens,
            f"moe.refinement refits by least squares: pruning.compensation={self.pruning.compensation.value} contradicts it; "
            "set moe=plain",
        )
        require(
            self.pruning.metric is not Metric.taylor or not self.moe.refinement.needs_tokens,
            "pruning.metric=taylor takes gradients of the dense model, which moe.refinement does not pass through; "
            "set moe=plain, or another pruning.metric",
        )
        named = self.affinity.measure if self.affinity.grouping is Grouping.mined else self.affinity.grouping
        chosen = named is not Measure.perplexity
        unheard = self.moe.construction is Construction.dive and self.moe.experts > 1 and not self.moe.needs_groups
        require(
            not (chosen and unheard),
            f"affinity={named.value}: with moe.refinement.start={self.moe.refinement.start.value} experts begin with tokens, and "
            "groups of domains have no say; set moe.refinement.start=groups, or moe=plain",
        )
        require(
            self.affinity.groups is None or self.affinity.grouping in (Grouping.given, Grouping.published),
            f"affinity.groups has no say with affinity.grouping={self.affinity.grouping.value}; set affinity=given",
        )
        if self.affinity.groups is not None and self.moe.needs_groups:
            require(
                self.moe.experts == len(self.affinity.groups),
                f"moe.experts ({self.moe.experts}) differs from the number of affinity.groups "
                f"({len(self.affinity.groups)}); set moe.experts={len(self.affinity.groups)}",
            )
        require(
            self.trainer.strategy is not Strategy.fsdp or self.model.dtype is Dtype.float32,
            f"model.dtype={self.model.dtype.value}: trainer=fsdp shards tensors of one type alone; set model.dtype=float32 "
            "(mixed precision computes in bfloat16), or trainer=fsdp2",
        )
        if self.model.load is Load.streamed:
            self._check_streamed()
        if self.moe.storage is Storage.shared:
            self._check_shared()
        world = self.trainer.devices * self.trainer.num_nodes
        for name, stage in self.retrain.stages.items():
            parts = (stage.accumulation or self.trainer.accumulation) * world
            require(
                stage.batch % parts == 0,
                f"retrain.stages.{name}.batch ({stage.batch}) does not divide into {parts} parts "
                "(accumulation × trainer.devices × trainer.num_nodes)",
            )

    def _check_shared(self) -> None:
        """Experts that are one tensor cannot be trained apart, or sharded apart from the dense model."""
        for name, stage in self.retrain.stages.items():
            require(
                stage.train.experts is not Freezing.full,
                f"moe.storage=shared: retrain.stages.{name}.train.experts=full trains what the experts share; set it to lora, or "
                "moe.storage=materialised",
            )
        require(
            self.trainer.strategy in (Strategy.single, Strategy.ddp),
            f"moe.storage=shared: trainer={self.trainer.strategy.value} shards the weights; set trainer=ddp, or "
            "moe.storage=materialised",
        )

    def _check_streamed(self) -> None:
        """What needs the whole model in memory."""
        require(
            not self.retrain.stages,
            f"model.load=streamed: retraining ({', '.join(self.retrain.stages)}) needs the whole model in memory; set "
            "retrain=none, or model.load=full",
        )
        require(
            not self.mines,
            "model.load=streamed: affinity=mined runs the whole model for every pair of domains; set affinity=random, given or "
            "published/NAME, or moe.refinement.start=kmeans, or model.load=full",
        )
        require(
            self.pruning.metric is not Metric.taylor,
            "model.load=streamed: pruning.metric=taylor takes gradients through the whole model; set another pruning.metric, "
            "or model.load=full",
        )
        require(
            self.pruning.compensation is not Compensation.bias,
            "model.load=streamed: pruning.compensation=bias has no place in a stock export; set another, or model.load=full",
        )
        require(
            not self.eval.tasks,
            "model.load=streamed: eval.tasks run the whole model; set eval.tasks=[] and measure the export by "
            "`python -m dive.evaluate`, or model.load=full",
        )


@dataclass(slots=True, kw_only=True)
class EvaluateConfig:
    """Evaluation of a finished model, dense or Mixture-of-Experts."""

    checkpoint: str = MISSING
    """Directory, hub id, or ``embedded`` for the model that comes with the package."""
    revision: str | None = None
    """Commit, branch or tag on the hub."""
    dtype: Dtype = Dtype.auto
    """Element type of the weights; ``auto`` takes the checkpoint's own."""
    device: str = "auto"
    """``cpu``, ``cuda``, ``cuda:1``, or ``auto``."""
    calibration_domains: CalibrationDomainsConfig | None = None
    """Domains whose test texts are measured; null for none."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    seed: int = 42
    store: str = "outputs/store"
    """Directory of the artifacts that runs share."""

    def __post_init__(self) -> None:
        require(
            self.calibration_domains is not None or bool(self.eval.sets or self.eval.tasks),
            "nothing to measure: set eval.tasks=[NAME], eval.sets, or calibration_domains=embedded",
        )
