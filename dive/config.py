"""The typed schema of the configuration, a dataclass a group, and every check that needs no model and no data.

Each dataclass mirrors one folder of ``conf/``. A number's bounds stand with its field and :mod:`dive.bounds` holds it to
them; what contradicts another value is checked by hand. A check that fails raises :class:`UserError` and names the override
to change; it runs when the composed configuration is turned into these objects, before anything is loaded.
"""

import math
import re
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import ClassVar, get_args

from omegaconf import MISSING

from dive.bounds import bounded, check_bounds
from dive.errors import UserError, require

MAX_LENGTH = 2**20
"""Tokens of a sequence."""
MAX_SEED = 2**32 - 1
"""What numpy's generators, which Lightning seeds, take at most."""


# -------------------------------------------------------------------------------------------------------------- budget


@dataclass(slots=True, kw_only=True)
class BudgetConfig:
    """How much text and training a run takes, from minutes to days. The other groups take these figures unless you set theirs."""

    name: str = MISSING
    """Name of the preset, which the plan prints."""
    smaller: str | None = None
    """The next smaller preset, whose cost the plan prints too."""
    larger: str | None = None
    """The next larger preset, whose cost the plan prints too."""
    samples: int = bounded(MISSING, at_least=1, at_most=10**7)
    """Calibration sequences per domain."""
    group_samples: int | None = bounded(None, at_least=1, at_most=10**9)
    """Calibration sequences per group of domains, see ``calibration_domains.group_samples``."""
    refinement_steps: int = bounded(MISSING, at_least=0, at_most=10**7)
    """Gradient steps per layer on experts and router together, while experts are built."""
    refinement_batch: int = bounded(MISSING, at_least=1, at_most=2**24)
    """Tokens of each of these steps."""
    end_to_end_tokens: int = bounded(57_344, at_least=1, at_most=10**14)
    """Calibration tokens of the stage that trains all layers together (``retrain=end_to_end``)."""
    tokens: int = bounded(MISSING, at_least=1, at_most=10**14)
    """Retraining tokens of all stages of a ``retrain`` preset together."""
    router_tokens: int = bounded(MISSING, at_least=1, at_most=10**14)
    """How many of these go to the stage that trains routers alone, in a preset that has one."""
    length: int = bounded(MISSING, at_least=2, at_most=MAX_LENGTH)
    """Tokens of a retraining sequence, and of a window of evaluation text."""
    batch: int = bounded(MISSING, at_least=1, at_most=10**6)
    """Sequences per optimiser step of retraining."""
    router_batch: int = bounded(MISSING, at_least=1, at_most=10**6)
    """Sequences per optimiser step of the stage that trains routers alone."""
    checkpoint_every: int = bounded(MISSING, at_least=1, at_most=10**9)
    """Optimiser steps between checkpoints of retraining."""
    windows: int | None = bounded(None, at_least=1, at_most=10**9)
    """Evaluation windows per text; all if null."""
    questions: int | None = bounded(None, at_least=1, at_most=10**9)
    """Questions per evaluation task, from the first; all if null."""


# --------------------------------------------------------------------------------------------------------------- model

AUTO = "auto"
"""What leaves a choice to the program."""
SHARD_BYTES = 1 << 30
"""Size of the shards of a streamed export. Here, as the plan counts with it and imports no torch."""


class Dtype(Enum):
    """Element type of weights."""

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
    """Family, such as ``llama``."""
    hidden_size: int = bounded(MISSING, at_least=1, at_most=2**20)
    """D, width of the hidden states."""
    intermediate_size: int = bounded(MISSING, at_least=1, at_most=2**24)
    """F, channels of each FFN."""
    num_hidden_layers: int = bounded(MISSING, at_least=1, at_most=10_000)
    """L, decoder layers."""
    num_attention_heads: int = bounded(MISSING, at_least=1, at_most=2**16)
    """Heads of the queries."""
    num_key_value_heads: int = bounded(MISSING, at_least=1, at_most=2**16)
    """Heads of the keys and values."""
    head_dim: int = bounded(MISSING, at_least=1, at_most=2**16)
    """Width of a head."""
    vocab_size: int = bounded(MISSING, at_least=1, at_most=2**26)
    """Tokens of the vocabulary."""
    max_position_embeddings: int = bounded(MISSING, at_least=1, at_most=2**31)
    """Longest sequence, in tokens."""
    tie_word_embeddings: bool = False
    """Whether the output head is the embedding."""
    dtype: str = "bfloat16"
    """Element type of the checkpoint, which ``model.dtype=auto`` takes."""

    @property
    def weights(self) -> int:
        """The model's size: embeddings, head and projections, without norms."""
        heads = (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        layer = self.hidden_size * (3 * self.intermediate_size + 2 * heads)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * layer

    def __post_init__(self) -> None:
        known = ("float64", "float32", "bfloat16", "float16")
        require(self.dtype in known, f"model.architecture.dtype ({self.dtype}) is none of {', '.join(known)}")


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """The dense model to start from."""

    name: str = MISSING
    """Short name for logs and the model card."""
    path: str = MISSING
    """Directory, GGUF file, hub id, or ``embedded`` for the model that comes with the package."""
    revision: str | None = None
    """Commit, branch or tag on the hub; pin it for numbers that can be repeated."""
    dtype: Dtype | None = None
    """Element type of the weights; null is bfloat16 on a GPU, and float32 on a CPU and with ``trainer=fsdp``. ``auto`` takes the
    checkpoint's own."""
    device: str = "auto"
    """Where calibration, mining and evaluation run: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``."""
    architecture: ArchitectureConfig | None = None
    """Figures for a plan without the model at hand; null reads its config.json."""
    load: Load = Load.full
    """``streamed`` calibrates, builds experts and exports a layer at a time; nothing is evaluated or retrained."""
    twin: str = AUTO
    """``model_type`` of the stock class that the model becomes (docs/serving.md); ``auto`` is the first of its family there."""
    export_dtype: Dtype | None = None
    """Element type of the export; ``dtype`` if null, the dense checkpoint's own if ``auto``."""


# ------------------------------------------------------------------------------------------------- calibration_domains


class TextSource(Enum):
    """Where the texts come from: the installed packages (``embedded``), data sets on the hub, or your own files (``local``)."""

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
    """Files inside the repository to read for ``test``."""
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
    - ``{messages}`` alone: a conversation, a list of ``{role, content}``, as the model's chat template writes it.

    ``{{`` and ``}}`` are braces. A row that lacks one of the values (null, an empty list, a hidden answer) is left out.
    """
    streaming: bool = False
    """Read from the start without downloading the whole set."""


@dataclass(slots=True, kw_only=True)
class CalibrationDomainsConfig:
    """The texts that calibrate pruning, one domain each, and how much of each is used."""

    source: TextSource = MISSING
    """Where the domains' texts come from: the installed packages (``embedded``), data sets on the hub, or your own files."""
    path: str | None = None
    """``local`` only: directory with ``<domain>/{train,test}.jsonl|txt|parquet``."""
    text_field: str = "text"
    """``local`` only: name of the column of text, or of conversations (lists of ``{role, content}``), which the model's chat
    template writes."""
    domains: list[str] | None = None
    """Names of the domains to use; all that the source has if null."""
    hub: dict[str, HubTextConfig] = field(default_factory=dict)
    """``hub`` only: the data set of each domain."""
    samples: int = bounded(32, at_least=1, at_most=10**7)
    """Calibration sequences per domain."""
    length: int = bounded(256, at_least=2, at_most=MAX_LENGTH)
    """Tokens per calibration sequence."""
    group_samples: int | None = bounded(None, at_least=1, at_most=10**9)
    """Calibration sequences of a group, split evenly over its domains, as in the paper; all of theirs if null. Where experts
    do not begin with groups, so many for each expert, of all domains."""
    generated: int = bounded(0, at_least=0, at_most=10**7)
    """Calibration sequences that the dense model writes itself, beside the domains' own: for text unlike any of the domains.
    Where stages read the domains' text, it has the same share of that as of calibration. It takes some time to write."""
    repeat: bool = False
    """Crop the same documents again where a domain has fewer tokens than are asked for, instead of refusing it."""
    batch: int = bounded(16, at_least=1, at_most=2**16)
    """Sequences per forward pass of calibration."""
    corpus: HubTextConfig | None = None
    """General text to go with them: what is retrained on where ``retrain.corpus`` names nothing. The domains' own if null."""

    def __post_init__(self) -> None:
        check_bounds(self, "calibration_domains")
        require(
            self.generated == 0 or self.length > 2,
            f"calibration_domains.generated gives its sequences two tokens to begin with, and calibration_domains.length is "
            f"{self.length}; raise calibration_domains.length to 3",
        )
        if self.source is TextSource.local:
            require(
                self.path is not None,
                "calibration_domains.path is needed with calibration_domains=local: a directory with <domain>/train.jsonl",
            )
        for name, given, source in (
            ("path", self.path is not None, TextSource.local),
            ("text_field", self.text_field != "text", TextSource.local),
            ("hub", bool(self.hub), TextSource.hub),
        ):
            if given and self.source is not source:
                raise UserError(
                    f"calibration_domains.{name} has no say with calibration_domains.source={self.source.value}; set "
                    f"calibration_domains{'=local' if source is TextSource.local else '.source=hub'}"
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
    """How each FFN is pruned: which channels go, and what makes up for them."""

    metric: Metric = Metric.wifv
    ratio: float = bounded(0.75, at_least=0, below=1)
    """Share of every FFN's channels that is removed, in [0, 1). With 0 every expert is the whole FFN: ``moe=upcycle`` as it was
    published, or by ``moe.experts=1`` the dense model itself, to retrain it like the others."""
    compensation: Compensation = Compensation.least_squares
    ridge: float | None = bounded(0.01, at_least=0, at_most=1000)
    """Ridge of least squares and of ``metric=obs``, as a share of the mean channel energy; keeps rare channels from
    over-fitting. Null chooses one for every expert by its error on a quarter of the calibration sequences."""
    obs_block: int = bounded(16, at_least=1, at_most=2**16)
    """``metric=obs`` only: channels removed at a time; 1 is the exact greedy order."""
    width_multiple: int = bounded(8, at_least=1, at_most=2**16)
    """The kept width is rounded to this multiple. Grouped matrix products need 8 (16 bytes of bfloat16); 32 is faster, 256
    suits llama.cpp's k-quants."""

    def __post_init__(self) -> None:
        check_bounds(self, "pruning")
        require(
            self.metric is not Metric.obs or self.compensation is Compensation.least_squares,
            f"pruning.metric=obs removes channels while it refits the others: pruning.compensation={self.compensation.value} "
            "contradicts it; set pruning.metric=wifv as well, or pruning.compensation=least_squares",
        )

    def effective(self) -> "PruningConfig":
        """The settings, with those that have no say under the others at their defaults."""
        default = PruningConfig()
        solves = self.compensation is Compensation.least_squares or self.metric is Metric.obs
        return replace(
            self,
            ridge=self.ridge if solves else default.ridge,
            obs_block=self.obs_block if self.metric is Metric.obs else default.obs_block,
        )

    @property
    def score_metric(self) -> Metric:
        """Score where one is needed channel by channel, or for single domains: ``obs`` has none, ``wifv`` stands in."""
        return Metric.wifv if self.metric is Metric.obs else self.metric

    def width(self, channels: int) -> int:
        """Channels kept of ``channels``: (1 - ratio) · channels, rounded to the nearest multiple; all of them with a ratio of 0.

        Raises:
            UserError: the multiple leaves nothing, or everything.
        """
        if self.ratio == 0:
            return channels
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
    """How the calibration domains are grouped, for experts that begin with groups of domains."""

    grouping: Grouping | None = None
    """How domains are grouped. Null leaves it to the construction: ``moe=plain`` mines groups, ``moe=default`` begins without."""
    measure: Measure = Measure.perplexity
    """``mined`` only: what tells how alike two domains are. ``perplexity``: of each pruned model on every domain, as in the
    paper; domains² evaluations. ``importance``: rank correlation of the channels' importance; ``mask_overlap``: channels kept in
    common. Both come from the calibration statistics alone."""
    linkage: Linkage = Linkage.complete
    """``mined`` only: rule of the hierarchical clustering. The paper does not name its own; average linkage tends to one large
    group and many single domains, complete linkage to groups of like size, as the published ones are."""
    samples: int = bounded(8, at_least=1, at_most=10**6)
    """``mined`` only: sequences per domain that measure each pruned model; drawn apart from the calibration ones."""
    mapped: int = bounded(1024, at_least=0, at_most=10**9)
    """Calibration tokens per domain from which a run that mines no groups maps the domains' affinity, to be looked at beside
    what its experts serve: the beginnings of up to 16 sequences. 0 maps nothing."""
    groups: list[list[str]] | None = None
    """``published`` and ``given``: the domains of each expert."""

    def mapped_of(self, samples: int, length: int) -> tuple[int, int]:
        """(sequences, tokens of each) that ``mapped`` takes of a domain's ``samples`` sequences of ``length`` tokens.

        Short beginnings of many sequences: 16 × 64 tokens have a map that correlates by 0.99 with that of 32 × 256, where
        4 × 256 have one that correlates by 0.93 (embedded model, one seed).
        """
        sequences = min(samples, 16)
        return sequences, min(math.ceil(self.mapped / sequences), length)

    def __post_init__(self) -> None:
        check_bounds(self, "affinity")
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


class RouterInit(Enum):
    """How the routers start: fitted to the experts' errors (``distilled``), or ``random``."""

    random = "random"
    distilled = "distilled"


@dataclass(slots=True, kw_only=True)
class DistillationConfig:
    """Fit of each router to the experts' errors against the dense FFN, before any retraining."""

    tokens: int = bounded(32768, at_least=1, at_most=10**9)
    """Calibration tokens per layer."""
    steps: int = bounded(900, at_least=1, at_most=10**7)
    """Optimiser steps per layer of the router's fit."""
    batch: int = bounded(4096, at_least=1, at_most=2**24)
    """Tokens per step of the router's fit."""
    learning_rate: float = bounded(0.05, above=0, at_most=100)
    """Learning rate of the router's fit, Adam."""
    temperature: float = bounded(0.1, at_least=1e-6, at_most=1e6)
    """Temperature of the first steps' soft target softmax(-error / (temperature · mean error))."""


class Start(Enum):
    """Tokens that each expert is first derived from, whatever their domain."""

    kmeans = "kmeans"
    random = "random"


@dataclass(slots=True, kw_only=True)
class RefinedConfig:
    """Experts refined on calibration tokens, layer by layer, with the routers that were fitted to them."""

    router_init: ClassVar[RouterInit] = RouterInit.distilled

    start: Start | None = None
    """What each expert begins with: clusters by ``kmeans`` of the layer's FFN inputs, or ``random`` tokens. Null begins with
    the groups that ``affinity`` names, or with ``kmeans`` where it names none."""
    rounds: int = bounded(1, at_least=0, at_most=1000)
    """Times that tokens go to the expert the router picks, and experts are derived anew from their tokens: k-means whose
    centroids are pruned FFNs."""
    sequential: bool = True
    """Take each layer's tokens through the already rebuilt layers before it."""
    correction: float = bounded(0.5, at_least=0, at_most=1)
    """``sequential`` only: share of the earlier layers' error that a layer's target makes up for."""
    steps: int = bounded(300, at_least=0, at_most=10**7)
    """Gradient steps per layer on experts and router together, against the dense FFN's output."""
    batch: int = bounded(4096, at_least=1, at_most=2**24)
    """Tokens per gradient step."""
    learning_rate: float = bounded(1e-2, above=0, at_most=100)
    """Learning rate of the experts, Adam."""
    router_learning_rate: float = bounded(2e-2, above=0, at_most=100)
    """Learning rate of the router, Adam."""
    balance: float = bounded(0.1, at_least=0, at_most=1e6)
    """Weight of the penalty on experts with more load than ``max_load``."""
    max_load: float = bounded(1.5, at_least=1, at_most=1e6)
    """Load of an expert over the mean load, from which it is penalised."""

    def effective(self, *, experts: int) -> "RefinedConfig":
        """The settings, with those that have no say under the others at their defaults."""
        default = RefinedConfig()
        trains, routes = self.steps > 0, experts > 1
        return replace(
            self,
            start=self.start if routes else default.start,
            rounds=self.rounds if routes else default.rounds,
            correction=self.correction if self.sequential else default.correction,
            batch=self.batch if trains else default.batch,
            learning_rate=self.learning_rate if trains else default.learning_rate,
            router_learning_rate=self.router_learning_rate if trains and routes else default.router_learning_rate,
            balance=self.balance if trains and routes else default.balance,
            max_load=self.max_load if trains and routes and self.balance else default.max_load,
        )


@dataclass(slots=True, kw_only=True)
class PlainConfig:
    """One expert a group of domains, pruned on its group's statistics alone, as in the paper."""

    shared: float = bounded(0.0, at_least=0, below=1)
    """Share of every expert's width that goes to channels which all experts have: those most important to all text together.
    The gates of the chosen experts sum to one, so a channel that stands in each of them is always on."""
    router_init: RouterInit = RouterInit.distilled


@dataclass(slots=True, kw_only=True)
class RandomSplitConfig:
    """The channels of every FFN dealt out to the experts at random, as in LLaMA-MoE."""

    router_init: RouterInit = RouterInit.random


@dataclass(slots=True, kw_only=True)
class CoactivationConfig:
    """Channels that fire together become an expert (MoEfication), those that fire most often stand in all (CMoE)."""

    shared: float = bounded(0.25, at_least=0, below=1)
    """Share of every expert's width that goes to channels which all experts have: those most often active."""
    active_channels: int = bounded(10, at_least=1, at_most=2**20)
    """Channels counted as active on a token (CMoE's K_a)."""
    router_init: RouterInit = RouterInit.distilled


@dataclass(slots=True, kw_only=True)
class UpcycleConfig:
    """Every expert starts as the same FFN, as in sparse upcycling; a router has nothing to learn from that yet."""

    router_init: ClassVar[RouterInit] = RouterInit.random


class Gates(Enum):
    """Weights of the chosen experts in the exported model."""

    renormalised = "renormalised"
    probabilities = "probabilities"


LEAST_SHARED = 16
"""Channels of a shared expert at least; fewer stand for none where a class must have one."""
ConstructionConfig = RefinedConfig | PlainConfig | RandomSplitConfig | CoactivationConfig | UpcycleConfig


@dataclass(slots=True, kw_only=True)
class MoEConfig:
    """How the Mixture-of-Experts is built. A run builds it in one way: the one whose settings (``moe.refined``, ``moe.plain``, …)
    are not null."""

    experts: int = bounded(8, at_least=1, at_most=10_000)
    """Experts of every layer."""
    top_k: int = bounded(1, at_least=1, at_most=10_000)
    """Experts that each token is sent to."""
    gates: Gates = Gates.renormalised
    """Weights of the chosen experts. ``renormalised``: they sum to one, so that a single expert's is 1 and teaches its router
    nothing. ``probabilities``: the router's own, over all experts; down projections are scaled to make up for what they lack of
    one."""
    shared_expert: float = bounded(0.0, at_least=0, below=1)
    """Share of every expert's width that goes to a shared expert instead: the channels most important to all text together, which
    every token meets once and no other expert has."""
    dense_layers: list[int] = bounded(default_factory=list, at_least=0, at_most=9_999)
    """Numbers, from 0, of layers that stay dense as they are: they get no experts, and no stage trains their FFN."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    refined: RefinedConfig | None = None
    plain: PlainConfig | None = None
    random_split: RandomSplitConfig | None = None
    coactivation: CoactivationConfig | None = None
    upcycle: UpcycleConfig | None = None

    @property
    def _constructions(self) -> dict[str, ConstructionConfig]:
        found = {f.name: getattr(self, f.name) for f in fields(self) if type(None) in get_args(f.type)}
        return {name: settings for name, settings in found.items() if settings is not None}

    @property
    def construction(self) -> str:
        """Name of the one way to build experts whose settings are there, and of its module in ``dive.moe.constructions``.

        Raises:
            UserError: there are none.
        """
        require(bool(self._constructions), "moe says no way to build experts; set moe=default")
        return next(iter(self._constructions))

    @property
    def settings(self) -> ConstructionConfig:
        """Of that construction."""
        return self._constructions[self.construction]

    @property
    def distils(self) -> bool:
        """Whether routers are fitted to the experts' errors."""
        return self.experts > 1 and self.settings.router_init is RouterInit.distilled

    @property
    def scales(self) -> bool:
        """Whether down projections are scaled to the gates."""
        return self.experts > 1 and self.gates is Gates.probabilities

    @property
    def samples_inputs(self) -> bool:
        """Whether a layer's inputs are sampled, ``distillation.tokens`` of them, for routers or scales to be fitted to."""
        return self.distils or self.scales

    @property
    def shares(self) -> bool:
        """Whether there is a shared expert."""
        return self.experts > 1 and self.shared_expert > 0

    def widths(self, pruning: PruningConfig, channels: int) -> tuple[int, int]:
        """Channels of an expert and of the shared one, out of ``channels``; together as many as without a shared one.

        Raises:
            UserError: the settings leave one of them nothing.
        """
        width, multiple = pruning.width(channels), pruning.width_multiple
        if not self.shares:
            return width, 0
        shared = round(width * self.shared_expert / multiple) * multiple
        require(
            LEAST_SHARED <= shared < width,
            f"moe.shared_expert ({self.shared_expert}) takes {shared} of an expert's {width} channels; it must be at least "
            f"{LEAST_SHARED} and leave some; change it, or pruning.width_multiple ({multiple})",
        )
        return width - shared, shared

    def effective(self, pruning: PruningConfig) -> "MoEConfig":
        """What building the experts follows from: settings that have no say in it are at their defaults."""
        averages = self.coactivation is not None and pruning.compensation is Compensation.none
        refined, plain = self.refined, self.plain
        sampled = self.distillation.tokens if self.scales else DistillationConfig().tokens
        if plain is not None and self.experts == 1:  # one pruned FFN has neither a router nor channels in common
            plain = PlainConfig()
        return replace(
            self,
            top_k=self.top_k if averages or refined is not None or self.scales else 1,
            gates=self.gates if self.scales else Gates.renormalised,
            shared_expert=self.shared_expert if self.shares else 0.0,
            dense_layers=sorted(self.dense_layers),
            distillation=self.distillation if self.distils else DistillationConfig(tokens=sampled),
            refined=None if refined is None else refined.effective(experts=self.experts),
            plain=plain,
        )

    @property
    def takes_groups(self) -> bool:
        """Whether experts can begin with groups of domains."""
        return self.experts > 1 and (self.plain is not None or self.refined is not None)

    def __post_init__(self) -> None:
        check_bounds(self, "moe")
        require(
            self.top_k <= self.experts,
            f"moe.top_k ({self.top_k}) must not exceed moe.experts ({self.experts})",
        )
        twice = sorted({number for number in self.dense_layers if self.dense_layers.count(number) > 1})
        require(not twice, f"moe.dense_layers names {', '.join(map(str, twice))} twice")
        chosen = [f"moe.{name}" for name in self._constructions]
        require(
            len(chosen) < 2,
            f"{' and '.join(chosen)} are both set, and a run builds experts in one way: choose it by the group, as in moe=plain, "
            "and leave out what is of another",
        )


# ------------------------------------------------------------------------------------------------------------- retrain


class Mode(Enum):
    """Which experts a stage runs: all of them (``dense``), or the selected ones (``sparse``)."""

    dense = "dense"
    sparse = "sparse"


class Freezing(Enum):
    """Whether a stage leaves a part of the model frozen, trains it in full, or trains low-rank adapters (LoRA) of it."""

    frozen = "frozen"
    full = "full"
    lora = "lora"


class Gate(Enum):
    """Weight of the selected experts in sparse training; at evaluation it is the stock class's, see :class:`Gates`."""

    renormalised = "renormalised"
    straight_through = "straight_through"
    switch = "switch"
    annealed = "annealed"


class Schedule(Enum):
    """How the learning rate moves over a stage."""

    constant = "constant"
    cosine = "cosine"


class StageText(Enum):
    """The text that a stage of retraining reads."""

    corpus = "corpus"
    calibration = "calibration"


@dataclass(slots=True, kw_only=True)
class FreezingConfig:
    """The freezing policy: what is trained, and how."""

    router: Freezing = Freezing.frozen
    """Routers: ``frozen``, or trained in ``full``."""
    experts: Freezing = Freezing.frozen
    """Experts: ``frozen``, trained in ``full``, or by low-rank adapters (``lora``)."""
    norms: Freezing = Freezing.frozen
    """Norms: ``frozen``, or trained in ``full``."""
    attention: Freezing = Freezing.frozen
    """Attention projections: ``frozen``, trained in ``full``, or by low-rank adapters (``lora``)."""
    embeddings: Freezing = Freezing.frozen
    """Embeddings: ``frozen``, trained in ``full``, or by low-rank adapters (``lora``)."""
    head: Freezing = Freezing.frozen
    """Output head: ``frozen``, trained in ``full``, or by low-rank adapters (``lora``)."""

    def __post_init__(self) -> None:
        for part in ("router", "norms"):
            require(
                getattr(self, part) is not Freezing.lora,
                f"retrain.stages.*.train.{part} is a vector or a few rows: lora makes no sense there, choose frozen or full",
            )


@dataclass(slots=True, kw_only=True)
class TeacherConfig:
    """What a stage learns from the dense model beside the text."""

    logits: float = bounded(0.0, at_least=0, at_most=1)
    """Share of the loss that is the Kullback-Leibler divergence from the dense model's next-token distribution, in [0, 1];
    the rest is cross-entropy."""
    temperature: float = bounded(1.0, at_least=0.01, at_most=1000)
    """Temperature of both distributions."""
    top_k: int | None = bounded(None, at_least=1, at_most=2**26)
    """Compare the dense model's k likeliest tokens, and all others as one; null compares every token."""
    hidden: float = bounded(0.0, at_least=0, at_most=10_000)
    """Weight of the relative squared distance between both models' hidden states, averaged over sequences and layers."""

    @property
    def wanted(self) -> bool:
        """Whether the dense model is needed at all."""
        return self.logits > 0 or self.hidden > 0


@dataclass(slots=True, kw_only=True)
class StageConfig:
    """One stage of retraining."""

    mode: Mode = Mode.sparse
    gate: Gate = Gate.renormalised
    """Sparse mode only: weight of the selected experts. ``renormalised``: as in the export. ``straight_through``: the same values
    with the gradient of the selected probabilities, so that top-1 routers learn. ``switch``: times the probability itself, whose
    exponent falls from 1 to 0 over the stage. ``annealed``, with ``moe.top_k=1`` alone: two experts, gates sharpened by a
    temperature that falls from 1 to 0.05."""
    balance: float = bounded(0.0, at_least=0, at_most=10_000)
    """Weight of the penalty on experts whose load in a forward pass exceeds ``max_load``."""
    max_load: float = bounded(1.5, at_least=1, at_most=10_000)
    """Load of an expert over the mean load, from which it is penalised."""
    z_loss: float = bounded(0.0, at_least=0, at_most=10_000)
    """Weight of the mean squared log-sum-exp of the router's logits (ST-MoE, arXiv 2202.08906)."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    temperature: float = bounded(1.0, at_least=0.001, at_most=1000)
    """Dense mode only: the gate is softmax(logits / temperature)."""
    train: FreezingConfig = field(default_factory=FreezingConfig)
    learning_rate: float = bounded(1e-4, above=0, at_most=10)
    """Highest learning rate of the stage; AdamW."""
    schedule: Schedule = Schedule.constant
    warmup: float = bounded(0.0, at_least=0, below=1)
    """Share of the steps over which the learning rate rises from 0."""
    floor: float = bounded(0.0, at_least=0, at_most=1)
    """Cosine only: final learning rate as a share of the peak."""
    weight_decay: float = bounded(0.0, at_least=0, at_most=10)
    """Weight decay of AdamW."""
    text: StageText = StageText.corpus
    """``corpus``: the retraining corpus; ``calibration``: the train splits of the calibration domains, evenly, and the stage's
    tokens count as calibration."""
    tokens: int = bounded(MISSING, at_least=1, at_most=10**14)
    """Tokens of the whole stage, over all devices; rounded up to whole steps."""
    batch: int = bounded(16, at_least=1, at_most=10**6)
    """Sequences per optimiser step, over all devices and accumulation steps."""
    accumulation: int | None = bounded(None, at_least=1, at_most=10**6)
    """Forward passes per optimiser step; ``trainer.accumulation`` if null."""

    def active(self, *, experts: int, top_k: int) -> int:
        """Experts that each token meets in this stage."""
        if self.mode is Mode.dense:
            return experts
        return min(2, experts) if self.gate is Gate.annealed else top_k


@dataclass(slots=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters of the parts that a stage trains by ``lora``. The paper takes rank 8, alpha 16 and dropout 0.1."""

    rank: int = bounded(8, at_least=1, at_most=4096)
    """Rank of the two factors."""
    alpha: float = bounded(16.0, above=0, at_most=100_000)
    """Scale: what the factors add is multiplied by alpha / rank."""
    dropout: float = bounded(0.0, at_least=0, below=1)
    """Dropout on the adapters' inputs, in training."""


class CorpusSource(Enum):
    """Where the retraining text comes from."""

    domains = "domains"
    local = "local"
    hub = "hub"


@dataclass(slots=True, kw_only=True)
class CorpusConfig:
    """The text that the model is retrained on."""

    source: CorpusSource | None = None
    """``domains``: the train splits of the calibration domains, evenly; ``local``: files; ``hub``: a data set. Null takes what
    ``path`` or ``hub.path`` names, else ``calibration_domains.corpus``, else ``domains``."""
    path: str | None = None
    """``local`` only: a file or a directory of jsonl, txt or parquet files."""
    text_field: str = "text"
    """``local`` only: name of the column of text or of conversations."""
    hub: HubTextConfig = field(default_factory=lambda: HubTextConfig(path=""))
    """``hub`` only: the data set."""
    shuffle_buffer: int = bounded(10_000, at_least=1, at_most=10**8)
    """``hub`` only: documents held for shuffling the stream."""

    @property
    def chosen(self) -> CorpusSource:
        """``source``, or the one that ``path`` or ``hub`` names."""
        if self.source is not None:
            return self.source
        if self.path is not None:
            return CorpusSource.local
        return CorpusSource.hub if self._names_hub else CorpusSource.domains

    def or_else(self, general: HubTextConfig | None) -> "CorpusConfig":
        """The same with ``calibration_domains.corpus`` where nothing else is named.

        Raises:
            UserError: what is said of a data set is said of none.
        """
        open_to_it = self.path is None and self.hub.path == "" and self.source in (None, CorpusSource.hub)
        if general is not None and open_to_it:
            require(
                not self._names_hub,
                "retrain.corpus.hub.path is needed with the rest of retrain.corpus.hub; what is retrained on else, "
                f"{general.path}, is changed by calibration_domains.corpus",
            )
            return replace(self, source=CorpusSource.hub, hub=general)
        chosen = self.chosen
        require(
            chosen is not CorpusSource.hub or self.hub.path != "",
            "retrain.corpus.hub.path is needed with retrain.corpus.source=hub",
        )
        require(
            chosen is CorpusSource.hub or self.shuffle_buffer == 10_000,
            f"retrain.corpus.shuffle_buffer has no say with retrain.corpus.source={chosen.value}; take it away",
        )
        return self

    @property
    def _names_hub(self) -> bool:
        return self.hub != HubTextConfig(path="")

    def __post_init__(self) -> None:
        chosen = self.chosen
        require(
            self.source is not None or self.path is None or not self._names_hub,
            "retrain.corpus.path and retrain.corpus.hub name two corpora; take one away, or set retrain.corpus.source",
        )
        if chosen is not CorpusSource.local:
            for name, given in (("path", self.path is not None), ("text_field", self.text_field != "text")):
                require(
                    not given,
                    f"retrain.corpus.{name} has no say with retrain.corpus.source={chosen.value}; set "
                    "retrain.corpus.source=local",
                )
        if chosen is CorpusSource.local:
            require(self.path is not None, "retrain.corpus.path is needed with retrain.corpus.source=local")


class Storage(Enum):
    """How experts are stored while they are retrained."""

    materialised = "materialised"
    indexed = "indexed"


@dataclass(slots=True, kw_only=True)
class RetrainConfig:
    """Retraining after the experts are built: stages, text, LoRA and checkpoints."""

    stages: dict[str, StageConfig] = field(default_factory=dict)
    """Stages by name, in the order in which they run."""
    length: int = bounded(256, at_least=2, at_most=MAX_LENGTH)
    """Tokens per training sequence."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    resume: str | None = "last"
    """``last`` goes on from an interrupted stage's last checkpoint, a path from that checkpoint, null starts anew."""
    checkpoint_every: int = bounded(100, at_least=1, at_most=10**9)
    """Optimiser steps between checkpoints of a running stage."""
    log_every: int = bounded(4, at_least=1, at_most=10**9)
    """Optimiser steps between logged values."""
    noise: float = bounded(0.0, at_least=0)
    """Scale of the learned router noise in training; the paper's is 0.0005. 0 adds none, and no noise weights."""
    storage: Storage = Storage.materialised
    """``indexed``: while retraining, experts are index sets into the dense model's FFNs, and adapters. Down projections that
    least squares refitted are each expert's own. The export is the same."""

    def __post_init__(self) -> None:
        check_bounds(self, "retrain")
        for name, stage in self.stages.items():
            where = f"retrain.stages.{name}"
            require(name not in RESERVED_STAGES, f"{where}: a run uses this name itself; rename the stage")
            require(
                re.fullmatch(r"\w[\w.-]{0,63}", name) is not None,
                f"{where}: a stage's name has up to 64 letters, digits, dots, dashes and underscores; rename it",
            )
            require(
                any(getattr(stage.train, part) is not Freezing.frozen for part in PARTS),
                f"{where}.train freezes everything; set one of {', '.join(PARTS)} to full or lora",
            )


RESERVED_STAGES = (
    # Of results, timings and the plan.
    *("dense", "pruned", "reconstructed", "checkpoint", "total", "dequantised", "calibration", "mining", "evaluation"),
    "export",
    # What loggers keep other values under.
    *("parameters", "cost", "final", "affinity", "routing", "figures", "results"),
)
"""Names that a stage of retraining cannot have."""
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
    """Name of the column of text or of conversations."""
    hub: HubTextConfig | None = None
    """``hub``: its ``test`` split is read."""
    lengths: list[int] = bounded(default_factory=lambda: [1024, 2048], at_least=2, at_most=MAX_LENGTH)
    """Window lengths in tokens."""
    separator: str | None = "\n\n"
    """Joins the documents to one text before it is cut into windows; null leaves them apart, as conversations always are."""


@dataclass(slots=True, kw_only=True)
class TaskConfig:
    """How one of ``eval.tasks`` is put to the model."""

    shots: int | None = bounded(None, at_least=0, at_most=1000)
    """Solved examples before each question; the task's own number (mostly none) if null."""
    limit: int | None = bounded(None, at_least=1, at_most=10**9)
    """Questions, from the first (of a group such as mmlu: of each member); ``eval.task_limit`` if null."""
    metric: str | None = None
    """Metric that tables show and average; the task's first if null. All are recorded."""


@dataclass(slots=True, kw_only=True)
class EvalConfig:
    """What is measured after every stage, and on how much text."""

    lengths: list[int] = bounded(default_factory=lambda: [256], at_least=2, at_most=MAX_LENGTH)
    """Window lengths in tokens for the domains' test texts; the mean in the headline is that of the first length."""
    windows: int | None = bounded(12, at_least=1, at_most=10**9)
    """Windows per set; all that the text fills if null."""
    batch: int = bounded(16, at_least=1, at_most=2**16)
    """Windows per forward pass."""
    allow_overlap: bool = False
    """Accept evaluation documents that stand in the training text as well."""
    generations: int = bounded(6, at_least=0, at_most=10_000)
    """Test texts that the dense model and the Mixture-of-Experts continue, to be read in the report."""
    generated_tokens: int = bounded(32, at_least=1, at_most=MAX_LENGTH)
    """Tokens of each continuation, at most half a window."""
    sets: dict[str, EvalSetConfig] = field(default_factory=dict)
    """Further evaluation texts, by name."""
    tasks: list[str] = field(default_factory=list)
    """Tasks, groups or tags of lm-evaluation-harness, or of ``task_path``; results.json lists them in this order."""
    task_settings: dict[str, TaskConfig] = field(default_factory=dict)
    """Settings by name of the task; those of tasks that are not in ``tasks`` have no effect."""
    task_path: str | None = None
    """Directory of task YAMLs of your own, beside the harness's. What their ``!function`` names is run."""
    task_limit: int | None = bounded(None, at_least=1, at_most=10**9)
    """Questions per task, from the first; all if null."""
    add_bos_token: bool | None = None
    """Whether prompts of tasks begin with the BOS token. Null leaves it to the tokenizer, which is the harness's default."""
    ngram: int = bounded(13, at_least=0, at_most=1000)
    """Length in words of the n-grams by which evaluation text is looked for in the training text; 0 turns the search off."""

    def __post_init__(self) -> None:
        check_bounds(self, "eval")
        require(bool(self.lengths), "eval.lengths is empty")
        for name, entry in self.sets.items():
            where = f"eval.sets.{name}"
            require(bool(entry.lengths), f"{where}.lengths is empty")
            require(entry.source is TextSource.hub or entry.path is not None, f"{where}.path is needed")
            require(entry.source is not TextSource.hub or entry.hub is not None, f"{where}.hub is needed")
        twice = sorted({name for name in self.tasks if self.tasks.count(name) > 1})
        require(not twice, f"eval.tasks names {twice} twice")


# ------------------------------------------------------------------------------------------------------------- trainer


class Strategy(Enum):
    """Lightning strategy of retraining on several devices."""

    single = "single"
    ddp = "ddp"
    fsdp = "fsdp"
    fsdp2 = "fsdp2"


class ExpertsBy(Enum):
    """What computes the experts in training: ``ours``, or one of transformers' experts implementations."""

    auto = "auto"
    ours = "ours"
    eager = "eager"
    batched_mm = "batched_mm"
    grouped_mm = "grouped_mm"
    sonicmoe = "sonicmoe"


ACCELERATORS = ("auto", "cpu", "gpu", "cuda")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true")


@dataclass(slots=True, kw_only=True)
class TrainerConfig:
    """The hardware that retraining runs on: accelerator, devices, precision, memory."""

    accelerator: str = "cpu"
    """``cpu``, ``gpu`` or ``cuda``; ``auto`` takes a GPU where there is one."""
    devices: int = bounded(1, at_least=1, at_most=1024)
    """Devices on each node."""
    num_nodes: int = bounded(1, at_least=1, at_most=10_000)
    """Nodes, that is machines."""
    strategy: Strategy = Strategy.single
    precision: str = "32-true"
    """Lightning precision; ``bf16-mixed`` on a GPU keeps what is trained in float32, whatever ``model.dtype`` is. ``auto`` is
    that on a GPU, and ``32-true`` on a CPU."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    accumulation: int | None = bounded(None, at_least=1, at_most=10**6)
    """Forward passes per optimiser step where a stage does not say; null takes as many as ``pass_tokens`` ask for."""
    pass_tokens: int = bounded(4096, at_least=1, at_most=2**30)
    """Most tokens of a forward pass on a device, but for a sequence that is longer."""
    gradient_clip: float | None = bounded(1.0, above=0, at_most=10**6)
    """Largest gradient norm; null for no clipping."""
    experts: ExpertsBy = ExpertsBy.auto
    """What computes the experts of a stage: ``auto``, ``ours``, or transformers' own ``eager``, ``batched_mm``, ``grouped_mm`` or
    ``sonicmoe`` (a kernel from the hub, for GPUs from Hopper on). ``auto`` is ``grouped_mm``, and ours with LoRA on experts,
    biases, ``retrain.storage=indexed``, float32 weights in mixed precision, or odd widths."""

    def __post_init__(self) -> None:
        check_bounds(self, "trainer")
        require(
            self.accelerator in ACCELERATORS,
            f"trainer.accelerator ({self.accelerator}) is none of {', '.join(ACCELERATORS)}",
        )
        require(
            self.precision in PRECISIONS, f"trainer.precision ({self.precision}) is none of {', '.join(PRECISIONS)}"
        )
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
    """Files metrics.csv in the run's directory."""


@dataclass(slots=True, kw_only=True)
class TensorBoardConfig:
    """Event files in the run's directory; needs the ``tensorboard`` extra."""


@dataclass(slots=True, kw_only=True)
class WandbConfig:
    """Weights & Biases; a run stays offline where nobody is logged in."""

    project: str = "dive"
    """Project that lists the run."""
    entity: str | None = None
    """User or team; whoever is logged in if null."""
    group: str | None = None
    """Group of runs that belong together; a sweep names its own."""
    name: str | None = None
    """Name of the run."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""


@dataclass(slots=True, kw_only=True)
class MLflowConfig:
    """MLflow, on a server or in a file; needs the ``mlflow`` extra."""

    uri: str | None = None
    """Tracking server (``http://HOST:5000``) or database (``sqlite:///FILE``); ``MLFLOW_TRACKING_URI`` if null, or else
    ``mlflow.db`` beside the store."""
    experiment: str | None = None
    """Experiment that lists the run; ``dive`` if null, and a sweep has one of its own."""
    name: str | None = None
    """Name of the run."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of the run: ``+logger.mlflow.tags.NAME=VALUE``."""


@dataclass(slots=True, kw_only=True)
class LoggerConfig:
    """Where losses and results are logged. Choose one or several: ``logger=[csv,wandb]``."""

    csv: CSVConfig | None = None
    tensorboard: TensorBoardConfig | None = None
    wandb: WandbConfig | None = None
    mlflow: MLflowConfig | None = None


# ---------------------------------------------------------------------------------------------------------------- plan


class PlanTable(Enum):
    """What ``python -m dive.plan`` prints."""

    stages = "stages"
    memory = "memory"
    construction = "construction"


@dataclass(slots=True, kw_only=True)
class DeviceConfig:
    """A device to estimate time and memory on."""

    bfloat16: float = bounded(MISSING, at_least=1, at_most=1e21)
    """Peak of matrix products in bfloat16 or float16, FLOP/s, without sparsity."""
    float32: float = bounded(MISSING, at_least=1, at_most=1e21)
    """Peak in float32, FLOP/s (torch's default: without TF32)."""
    float64: float = bounded(MISSING, at_least=1, at_most=1e21)
    """Peak in float64, FLOP/s; least squares is solved in it."""
    utilisation: float = bounded(MISSING, at_least=1e-6, at_most=1)
    """Share of these peaks that whole stages reach."""
    bandwidth: float = bounded(MISSING, at_least=1, at_most=1e21)
    """Bandwidth of the device's memory, bytes/s."""
    link: float = bounded(MISSING, at_least=1, at_most=1e21)
    """Bandwidth between the device and the host's memory, bytes/s."""
    memory: float | None = bounded(None, at_least=1, at_most=1e18)
    """Memory of the device in bytes; null for a CPU, which computes in the host's memory."""


@dataclass(slots=True, kw_only=True)
class PlanConfig:
    """The device that a run is planned for, and what the plan assumes."""

    device: str = "auto"
    """Device to plan for, one of ``devices``; ``auto`` is ``cpu`` where ``trainer.accelerator`` is, else ``h100``."""
    devices: dict[str, DeviceConfig] = field(default_factory=dict)
    """Devices by name; the preset has some."""
    cores: int | None = bounded(None, at_least=1, at_most=4096)
    """Cores of a CPU, which is planned for by the core; null for as many as a process would use on this machine."""
    table: PlanTable = PlanTable.stages
    """What ``python -m dive.plan`` prints. ``stages``: cost of each stage; ``memory``: what fills the memory; ``construction``:
    what building the experts costs."""
    enforce: bool = True
    """Refuse a run that the plan says this machine has no room for."""
    windows: int = bounded(300, at_least=1, at_most=10**9)
    """Windows assumed of each evaluation text where ``eval.windows`` is null."""
    questions: int = bounded(2000, at_least=1, at_most=10**9)
    """Questions assumed of each of ``eval.tasks`` where no limit is set."""
    answers: int = bounded(4, at_least=1, at_most=1000)
    """Answers assumed of each question."""
    question_tokens: int = bounded(64, at_least=1, at_most=MAX_LENGTH)
    """Tokens assumed of a question with one of its answers; each example before it has as many."""
    disk: float = bounded(1e9, at_least=1, at_most=1e15)
    """Bandwidth of the disk, bytes/s."""

    def __post_init__(self) -> None:
        check_bounds(self, "plan")
        choices = ["auto", *self.devices]
        require(self.device in choices, f"plan.device ({self.device}) is none of {', '.join(choices)}")


# ---------------------------------------------------------------------------------------------------------- experiment


NO_STORE = "store is empty: set store=DIR"


@dataclass(slots=True, kw_only=True)
class Config:
    """A whole experiment."""

    budget: BudgetConfig = field(default_factory=BudgetConfig)
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
    seed: int = bounded(42, at_least=0, at_most=MAX_SEED)
    """Seed of everything that is drawn at random."""
    store: str = "outputs/store"
    """Directory of the results that runs share, so that none is computed twice."""

    @property
    def grouping(self) -> Grouping | None:
        """How the domains are grouped that experts begin with; none where they begin otherwise."""
        if not self.moe.takes_groups:
            return None
        return self.affinity.grouping or (Grouping.mined if self.moe.plain is not None else None)

    @property
    def mines(self) -> bool:
        """Whether groups are mined, which takes a calibration pass and the measure between domains."""
        return self.grouping is Grouping.mined

    @property
    def maps(self) -> bool:
        """Whether the domains' affinity is mapped beside the experts; a streamed run measures nothing to look at it with."""
        several = self.moe.experts > 1 and self.affinity.mapped > 0
        return several and not self.mines and self.model.load is not Load.streamed

    def accumulation(self, stage: StageConfig) -> int:
        """Forward passes of an optimiser step on each device: what is asked for, or the fewest that ``pass_tokens`` allow."""
        asked = stage.accumulation or self.trainer.accumulation
        if asked is not None:
            return asked
        share = stage.batch // (self.trainer.devices * self.trainer.num_nodes)
        fits = max(self.trainer.pass_tokens // self.retrain.length, 1)
        return next((n for n in range(1, share) if share % n == 0 and share // n <= fits), max(share, 1))

    def settled(self, *, gpu: bool) -> "Config":
        """The same with what is left to the device decided: accelerator, precision and element type.

        Args:
            gpu: whether there is one.
        """
        trainer = self.trainer
        if self.model.dtype is not None and "auto" not in (trainer.accelerator, trainer.precision):
            return self
        accelerator = ("gpu" if gpu else "cpu") if trainer.accelerator == "auto" else trainer.accelerator
        on_gpu = accelerator != "cpu"
        precision = ("bf16-mixed" if on_gpu else "32-true") if trainer.precision == "auto" else trainer.precision
        whole = precision == "32-true" or trainer.strategy is Strategy.fsdp  # the latter shards tensors of one type
        half = on_gpu and not whole and not self.model.device.startswith("cpu")
        dtype = self.model.dtype or (Dtype.bfloat16 if half else Dtype.float32)
        return replace(
            self,
            model=replace(self.model, dtype=dtype),
            trainer=replace(trainer, accelerator=accelerator, precision=precision),
        )

    def __post_init__(self) -> None:
        check_bounds(self)
        require(self.store.strip() != "", NO_STORE)
        self.retrain = replace(self.retrain, corpus=self.retrain.corpus.or_else(self.calibration_domains.corpus))
        construction = self.moe.construction
        if self.moe.refined is not None:
            self._check_refined(self.moe.refined)
        require(
            self.pruning.compensation is not Compensation.bias or self.moe.plain is not None,
            f"pruning.compensation=bias goes with moe=plain, not with moe={construction}; choose least_squares or none",
        )
        if self.affinity.groups is not None:
            require(
                self.affinity.grouping in (Grouping.given, Grouping.published),
                "affinity.groups has no say with affinity.grouping="
                f"{'null' if self.affinity.grouping is None else self.affinity.grouping.value}; set affinity=given",
            )
            require(
                not self.moe.takes_groups or self.moe.experts == len(self.affinity.groups),
                f"moe.experts ({self.moe.experts}) differs from the number of affinity.groups "
                f"({len(self.affinity.groups)}); set moe.experts={len(self.affinity.groups)}",
            )
        require(
            self.trainer.strategy is not Strategy.fsdp or self.model.dtype in (None, Dtype.float32),
            f"{'' if self.model.dtype is None else f'model.dtype={self.model.dtype.value}: '}trainer=fsdp shards tensors of one "
            "type alone; set model.dtype=float32 (mixed precision computes in bfloat16), or trainer=fsdp2",
        )
        if self.model.load is Load.streamed:
            self._check_streamed()
        if self.retrain.storage is Storage.indexed:
            self._check_indexed()
        if self.retrain.stages and self.trainer.experts not in (ExpertsBy.auto, ExpertsBy.ours):
            self._check_stock_experts(self.trainer.experts)
        world = self.trainer.devices * self.trainer.num_nodes
        for name, stage in self.retrain.stages.items():
            require(
                stage.gate is Gate.renormalised or not self.moe.scales,
                f"retrain.stages.{name}.gate={stage.gate.value} is for gates that teach a router nothing, and "
                f"moe.gates=probabilities do; set retrain.stages.{name}.gate=renormalised, or moe.gates=renormalised",
            )
            require(
                stage.mode is Mode.sparse or not self.moe.scales,
                f"retrain.stages.{name}.mode=dense has gates that sum to one, and moe.gates=probabilities scales experts to "
                f"others; set retrain.stages.{name}.mode=sparse, or moe.gates=renormalised",
            )
            require(
                stage.gate is not Gate.annealed or stage.mode is Mode.dense or self.moe.top_k == 1,
                f"retrain.stages.{name}.gate=annealed is for one expert a token; from moe.top_k=2 on routers learn without: set "
                f"retrain.stages.{name}.gate=renormalised",
            )
            parts = (stage.accumulation or self.trainer.accumulation or 1) * world
            require(
                stage.batch % parts == 0,
                f"retrain.stages.{name}.batch ({stage.batch}) does not divide into {parts} parts "
                "(accumulation × trainer.devices × trainer.num_nodes)",
            )

    def _check_refined(self, refined: RefinedConfig) -> None:
        """What refinement on tokens leaves no room for."""
        require(
            self.pruning.compensation is Compensation.least_squares,
            f"moe.refined refits by least squares: pruning.compensation={self.pruning.compensation.value} contradicts it; "
            "set moe=plain",
        )
        require(
            self.pruning.metric is not Metric.taylor,
            "pruning.metric=taylor takes gradients of the dense model, which moe.refined does not pass through; "
            "set moe=plain, or another pruning.metric",
        )
        if not self.moe.takes_groups:
            return
        grouping, measure = self.affinity.grouping, self.affinity.measure
        require(
            grouping is None or refined.start is None,
            f"moe.refined.start={'' if refined.start is None else refined.start.value} begins without groups of domains, and "
            f"affinity.grouping={'' if grouping is None else grouping.value} names some; leave one of them out",
        )
        require(
            grouping is not None or measure is Measure.perplexity,
            f"affinity.measure={measure.value}: experts begin without groups of domains, so that it has no say; set "
            "affinity=mined, or moe=plain",
        )

    def _check_indexed(self) -> None:
        """Experts that are one tensor cannot be trained apart, or sharded apart from the dense model."""
        require(
            self.moe.refined is None or self.moe.refined.steps == 0,
            "retrain.storage=indexed: moe.refined.steps change the experts' gate and up projections, which are then no longer "
            "the dense model's; set moe.refined.steps=0, moe=plain, or retrain.storage=materialised",
        )
        for name, stage in self.retrain.stages.items():
            require(
                stage.train.experts is not Freezing.full,
                f"retrain.storage=indexed: retrain.stages.{name}.train.experts=full trains what experts have in common; set it "
                "to lora, or retrain.storage=materialised",
            )
        require(
            self.trainer.strategy in (Strategy.single, Strategy.ddp),
            f"retrain.storage=indexed: trainer={self.trainer.strategy.value} shards the weights; set trainer=ddp, or "
            "retrain.storage=materialised",
        )

    def _check_stock_experts(self, chosen: ExpertsBy) -> None:
        """What transformers' own implementations have no place for."""
        stated = f"trainer.experts={chosen.value}"
        adapted = [name for name, stage in self.retrain.stages.items() if stage.train.experts is Freezing.lora]
        require(
            not adapted,
            f"{stated} knows no adapters, and retrain.stages.{''.join(adapted[:1])}.train.experts=lora has some; set "
            "trainer.experts=auto, or train them in full",
        )
        require(
            self.pruning.compensation is not Compensation.bias,
            f"{stated} knows no biases of experts, and pruning.compensation=bias has some; set trainer.experts=auto",
        )
        require(
            self.retrain.storage is not Storage.indexed,
            f"{stated} needs experts of their own, and retrain.storage=indexed has none; set trainer.experts=auto, or "
            "retrain.storage=materialised",
        )
        if chosen is not ExpertsBy.sonicmoe:
            return
        require(
            self.trainer.accelerator != "cpu",
            f"{stated} is a kernel for GPUs; set trainer.experts=auto, or trainer=gpu",
        )
        precision = self.trainer.precision
        require(
            precision == "auto" or precision.endswith("16-true"),
            f"{stated} computes in 16 bits, and trainer.precision={precision} keeps what is trained in float32; set "
            "trainer.precision=bf16-true, or trainer.experts=auto",
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
            "published/NAME, or default with moe=default, or model.load=full",
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
    """Directory, GGUF file, hub id, or ``embedded`` for the model that comes with the package."""
    revision: str | None = None
    """Commit, branch or tag on the hub."""
    dtype: Dtype = Dtype.auto
    """Element type of the weights; ``auto`` takes the checkpoint's own."""
    device: str = "auto"
    """Where the model runs: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``."""
    calibration_domains: CalibrationDomainsConfig | None = None
    """Domains whose test texts are measured; null for none."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """How much is measured: windows and questions."""
    seed: int = bounded(42, at_least=0, at_most=MAX_SEED)
    """Seed of everything that is drawn at random."""
    store: str = "outputs/store"
    """Directory of the results that runs share, so that none is computed twice."""

    def __post_init__(self) -> None:
        check_bounds(self)
        require(self.store.strip() != "", NO_STORE)
        require(
            self.calibration_domains is not None or bool(self.eval.sets or self.eval.tasks),
            "nothing to measure: set eval.tasks=[NAME], eval.sets, or calibration_domains=embedded",
        )
