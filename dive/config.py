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


class Dtype(Enum):
    """Element type of the weights in memory."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


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
    """Calibration sequences of a group, split evenly over its domains, as in the paper; all of theirs if null."""
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
    ridge: float = 0.01
    """Least squares only: ridge as a share of the mean channel energy; keeps rare channels from over-fitting."""
    width_multiple: int = 8
    """The kept width is rounded to this multiple. Grouped matrix products need 8 (16 bytes of bfloat16); 32 is faster, 256
    suits llama.cpp's k-quants."""

    def __post_init__(self) -> None:
        require(0.0 < self.ratio < 1.0, f"pruning.ratio ({self.ratio}) must lie strictly between 0 and 1")
        require(self.ridge >= 0.0, f"pruning.ridge ({self.ridge}) must not be negative")
        require(self.width_multiple >= 1, f"pruning.width_multiple ({self.width_multiple}) must be at least 1")

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


class Linkage(Enum):
    """Rule of the hierarchical clustering (``scipy.cluster.hierarchy``)."""

    average = "average"
    complete = "complete"
    single = "single"


@dataclass(slots=True, kw_only=True)
class AffinityConfig:
    """How the calibration domains become groups."""

    grouping: Grouping = Grouping.mined
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


@dataclass(slots=True, kw_only=True)
class MoEConfig:
    """The Mixture-of-Experts that is built."""

    experts: int = 8
    top_k: int = 1
    construction: Construction = Construction.dive
    router_init: RouterInit = RouterInit.distilled
    noise: float = 0.0
    """Scale of the learned router noise in training; the paper's is 0.0005. 0 adds none, and no noise weights."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

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
        require(self.noise >= 0.0, f"moe.noise ({self.noise}) must not be negative")


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
class StageConfig:
    """One stage of retraining."""

    mode: Mode = Mode.sparse
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
    """``domains``: the train splits of the calibration domains, evenly; ``local``: files; ``hub``: streamed."""
    path: str | None = None
    """``local`` only: a file or a directory of jsonl, txt or parquet files."""
    text_field: str = "text"
    """``local`` only: name of the text column."""
    hub: HubTextConfig | None = None
    """``hub`` only."""
    shuffle_buffer: int = 10_000
    """``hub`` only: documents held for shuffling the stream."""

    def __post_init__(self) -> None:
        if self.source is CorpusSource.local:
            require(self.path is not None, "retrain.corpus.path is needed with retrain.corpus.source=local")
        if self.source is CorpusSource.hub:
            require(self.hub is not None, "retrain.corpus.hub.path is needed with retrain.corpus.source=hub")


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
    log_every: int = 10
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
    seed: int = 42
    store: str = "outputs/store"
    """Directory of the artifacts that runs share."""

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed ({self.seed}) must not be negative")
        require(
            not (self.pruning.compensation is Compensation.bias and self.moe.construction is not Construction.dive),
            "pruning.compensation=bias goes with moe.construction=dive alone; choose least_squares or none",
        )
        if self.affinity.groups is not None and self.moe.construction is Construction.dive and self.moe.experts > 1:
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
        world = self.trainer.devices * self.trainer.num_nodes
        for name, stage in self.retrain.stages.items():
            parts = (stage.accumulation or self.trainer.accumulation) * world
            require(
                stage.batch % parts == 0,
                f"retrain.stages.{name}.batch ({stage.batch}) does not divide into {parts} parts "
                "(accumulation × trainer.devices × trainer.num_nodes)",
            )
