"""What a run found, as ``results.json`` holds it: written by :func:`write_results`, read back by :func:`read_results`.

A field without a default always stands in the file; one whose default is ``None`` is left out while it is none, and missing in
files of older versions. Shapes: n domains, E experts, L layers.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from dive.errors import UserError
from dive.store import write_json

FILE = "results.json"
DENSE, PRUNED, RECONSTRUCTED, CHECKPOINT = "dense", "pruned", "reconstructed", "checkpoint"
DEQUANTISED = "dequantised"
GENERATED = "generated"
"""What a run does first with a GGUF file; it is measured as the dense model."""
LABELS = {
    DENSE: "dense model",
    PRUNED: "pruned, one expert",
    RECONSTRUCTED: "experts, not retrained",
    "retrain": "retrained",
}
"""What readers who have not seen the code are told of a stage; one that is not here trained, and is called by its name."""


@dataclass(slots=True, kw_only=True)
class Split:
    """SHA-256 of a domain's documents."""

    train: str
    test: str


@dataclass(slots=True, kw_only=True)
class Fingerprints:
    """What tells two runs' inputs apart."""

    model: str
    domains: dict[str, Split]
    retraining_corpus: str | None = None
    """None where a finished model was measured."""


@dataclass(slots=True, kw_only=True)
class Samples:
    """(sequences, tokens) of every text."""

    evaluation: dict[str, list[int]]
    calibration: dict[str, list[int]] | None = None


@dataclass(slots=True, kw_only=True)
class Origin:
    """What was run, with what, on what."""

    command: list[str]
    seed: int
    device: str
    versions: dict[str, str]
    """{package: version} of everything that figures depend on."""
    fingerprints: Fingerprints
    samples: Samples
    config: dict[str, Any]
    """The composed configuration."""
    precision: str | None = None
    """What quantisation left of the dense model's weights; none where it came from no GGUF file."""
    artifacts: list[str] | None = None
    """``<kind>/<key>`` of everything in the store that the results were made of; see ``python -m dive.store prune``."""


@dataclass(slots=True, kw_only=True)
class AskedTask:
    """How an evaluation task was put, and on how many questions."""

    shots: int | None
    """Solved examples before each question; none for the task's own number."""
    limit: int | None
    metric: str | None
    """The one chosen to stand for the task; none for its first."""
    questions: int
    members: list[str]


@dataclass(slots=True, kw_only=True)
class Measured:
    """What models were measured on."""

    domains: list[str]
    sets: list[str]
    tasks: dict[str, AskedTask] = field(default_factory=dict)
    skipped: str | None = None
    """Why nothing was measured."""


@dataclass(slots=True, kw_only=True)
class SeenText:
    """How much of one text stands in the training text."""

    documents: int
    long_enough: int
    found: int
    share: float
    ngrams: int
    ngrams_found: int
    ngram_share: float
    sources: dict[str, int]
    """{training text: documents found in it}"""
    cut: int = 0
    """Documents of which only the beginning was looked for."""


@dataclass(slots=True, kw_only=True)
class Contamination:
    """How much of every evaluation text stands in the training text; all none where nobody looked."""

    ngram: int | None = None
    """Words in a row that count as found."""
    domains: dict[str, SeenText] | None = None
    sets: dict[str, SeenText] | None = None
    tasks: dict[str, SeenText] | None = None


@dataclass(slots=True, kw_only=True)
class ParameterCounts:
    """Parameters of the models; ``trained`` are those that any retraining stage changed."""

    dense: int | None = None
    pruned: int | None = None
    total: int | None = None
    active: int | None = None
    trained: int | None = None


@dataclass(slots=True, kw_only=True)
class StageResult:
    """What one stage reached and cost."""

    name: str
    tokens: int
    """It was retrained on."""
    calibration: bool = False
    """Whether these were the calibration domains' and count as calibration."""
    seconds: float
    """Making it took, whenever that was."""
    reused: bool
    trained: int
    """Parameters that it trained."""
    perplexity: dict[str, float]
    """{"mean" | "mean@length" | set | "domain@length" | "set@length": perplexity}"""
    tasks: dict[str, dict[str, Any]] | None = None
    """{task: {metric: value}}; files of older versions have names among the values."""
    tasks_mean: float | None = None
    versions: dict[str, str] | None = None
    """{package: version} that made it, where it was found in the store and others made it than this run has."""

    @property
    def mean(self) -> float:
        """The headline: geometric mean over the domains."""
        return self.perplexity["mean"]

    @property
    def label(self) -> str:
        """Its name as a reader who has not seen the code understands it."""
        return LABELS.get(self.name, f"after stage {self.name}")


@dataclass(slots=True, kw_only=True)
class RoutingAgreement:
    """How far the experts, after the last stage, serve the groups."""

    rand: float
    """Adjusted Rand index between the groups and the domains by the expert that gets most of their tokens."""
    within: float | None = None
    """Overlap of the routing of two domains of one group, Σ_e min(p_e, q_e), mean over pairs and layers; none without pairs."""
    between: float | None = None
    """The same of domains of different groups."""


@dataclass(slots=True, kw_only=True)
class AffinityResult:
    """Which domains belong together, and what says so."""

    domains: list[str]
    groups: list[list[str]] | None = None
    """By the tree; experts began with them where they are the run's groups."""
    tree: list[list[float]] | None = None
    """Linkage matrix (n - 1, 4)."""
    cophenetic: float | None = None
    silhouette: float | None = None
    perplexity: list[list[float]] | None = None
    """(n, n), of the model pruned on the row's domain, on the column's."""
    similarity: list[list[float]] | None = None
    """(n, n), in place of perplexity where another measure was chosen."""
    measure: str | None = None
    agreement: dict[str, float] | None = None
    """{other measure: adjusted Rand index between its groups and these}"""
    routing: RoutingAgreement | None = None
    seconds: float | None = None


@dataclass(slots=True, kw_only=True)
class ExpertToken:
    """A token of the vocabulary that an expert gets more often than others do."""

    id: int
    share: float
    """Of the token's assignments, over all layers, that the expert gets."""
    lift: float
    """This share over the expert's share of all tokens."""
    text: str | None = None


@dataclass(slots=True, kw_only=True)
class RoutedText:
    """The beginning of a domain's test text, token by token."""

    domain: str
    ids: list[int]
    """(T,)"""
    experts: list[str]
    """(L,), a line a layer: the number of each token's likeliest expert, separated by spaces."""
    tokens: list[str] | None = None
    """(T,), what each of them reads."""


@dataclass(slots=True, kw_only=True)
class RoutingResult:
    """Which experts a domain's tokens go to, in the last stage; all none where no routers were measured."""

    share: dict[str, list[float]] | None = None
    """{domain: (E,)}, mean over layers."""
    share_by_layer: dict[str, list[list[float]]] | None = None
    """{domain: (L, E)}"""
    layers: list[int] | None = None
    """Numbers of these L layers; all layers in their order if none."""
    load_max_over_mean: list[float] | None = None
    load_entropy: list[float] | None = None
    """Nats, a layer each."""
    tokens: list[list[ExpertToken]] | None = None
    """Of each expert the tokens that set it apart, the most telling first; see :func:`dive.eval.routing.top_tokens`."""
    texts: list[RoutedText] | None = None
    """One a domain."""


@dataclass(slots=True, kw_only=True)
class Continuation:
    """The beginning of a test text, continued."""

    domain: str
    prompt: str
    reference: str
    dense: str
    moe: str


@dataclass(slots=True, kw_only=True)
class PlannedStage:
    """What a stage was to cost."""

    name: str
    tokens: int = 0
    flops: float | None = None
    seconds: float
    host_bytes: float
    device_bytes: float
    disk_bytes: float


@dataclass(slots=True, kw_only=True)
class PlannedDisk:
    """Bytes by place."""

    store: float
    export: float
    checkpoints: float


@dataclass(slots=True, kw_only=True)
class Planned:
    """What the run was to cost."""

    device: str
    cores: int | None = None
    utilisation: float | None = None
    parameters: dict[str, int] | None = None
    seconds: float
    host_bytes: float
    device_bytes: float
    disk_bytes: PlannedDisk
    stages: list[PlannedStage]


@dataclass(slots=True, kw_only=True)
class SpentStage:
    """What a stage took."""

    name: str
    reused: bool = False
    seconds: float
    host_bytes: float
    device_bytes: float
    disk_bytes: float


@dataclass(slots=True, kw_only=True)
class Spent:
    """What the run took."""

    seconds: float
    host_bytes: float
    device_bytes: float
    disk_bytes: float
    stages: list[SpentStage]


@dataclass(slots=True, kw_only=True)
class PlanResult:
    """What was planned beside what it took."""

    planned: Planned
    actual: Spent


@dataclass(slots=True, kw_only=True)
class Results:
    """All that a run found. Measuring a finished model has one stage, and neither groups nor routing."""

    run: Origin
    evaluation: Measured
    contamination: Contamination = field(default_factory=Contamination)
    groups: list[list[str]] | None = None
    """Domains that each expert began with; empty where experts began otherwise."""
    parameters: ParameterCounts = field(default_factory=ParameterCounts)
    stages: list[StageResult] = field(default_factory=list)
    routing: RoutingResult | None = None
    timings: dict[str, float] = field(default_factory=dict)
    """{stage | "total": seconds}"""
    affinity: AffinityResult | None = None
    """None where the domains were not compared."""
    overlap: list[list[float]] | None = None
    """(E, E), share of channels that two experts both keep of those that either keeps."""
    generations: list[Continuation] | None = None
    export: str | None = None
    """Directory of the reloadable model; a run that has none is not finished."""
    plan: PlanResult | None = None

    def stage(self, name: str) -> StageResult | None:
        """The stage of this name; none where the run has not got there, or has none."""
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def dense(self) -> StageResult | None:
        """The model that the run began with."""
        return self.stage(DENSE)

    @property
    def pruned(self) -> StageResult | None:
        """The model pruned once for everything."""
        return self.stage(PRUNED)

    @property
    def share(self) -> dict[str, list[float]]:
        """{domain: share of its tokens that each expert gets}; empty where no routers were measured."""
        return (self.routing.share if self.routing is not None else None) or {}

    @property
    def tokens(self) -> int:
        """Retraining tokens of all stages."""
        return sum(stage.tokens for stage in self.stages if not stage.calibration)

    @property
    def calibration_tokens(self) -> int:
        """Tokens that experts were built from, and those of the stages that count as calibration."""
        sampled = (self.run.samples.calibration or {}).values()
        return sum(map(math.prod, sampled)) + sum(stage.tokens for stage in self.stages if stage.calibration)

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration, flat: {"moe.experts": 8}."""
        return flatten(self.run.config)

    def size_of(self, stage: StageResult) -> tuple[int | None, int | None]:
        """(active, total) parameters of a stage's model; none where an older run did not record them."""
        counts = self.parameters
        alone = {DENSE: (counts.dense, counts.dense), PRUNED: (counts.pruned, counts.pruned)}
        return alone.get(stage.name, (counts.active, counts.total))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# ----------------------------------------------------------------------------------------------------------------- file


def write_results(results: Results, directory: Path) -> Path:
    """Write ``results.json`` so that a reader never sees half of it."""
    file = directory / FILE
    write_json(file, to_json(results))
    return file


def read_results(directory: Path) -> Results:
    """``results.json`` of a run.

    Raises:
        UserError: it is missing or unreadable.
    """
    file = directory / FILE
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; name the directory of a run or of a sweep") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not the results of a run") from error
    try:
        return from_json(value)
    except UserError as error:
        raise UserError(f"{file}: not the results of a run ({error})") from None


def to_json(value: Any) -> Any:
    """Results, or a part of them, as JSON values."""
    if is_dataclass(value):
        found = {f.name: (f, getattr(value, f.name)) for f in fields(value)}
        return {name: to_json(v) for name, (f, v) in found.items() if v is not None or f.default is not None}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def from_json(value: Any) -> Results:
    """The results that these JSON values are of; what we do not know is left out.

    Raises:
        UserError: something is missing, or no value of its type.
    """
    results: Results = read_as(Results, value, "it")
    return results


def read_as(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as this type: a dataclass, a list, a dictionary, a number or text; or one of them or none.

    Raises:
        UserError: it is another one's.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or (value is None and origin is UnionType):
        return value
    if origin is UnionType:
        return read_as(inner[0], value, where)
    expected: Any = dict if is_dataclass(kind) else (int, float) if kind is float else origin or kind
    if not isinstance(value, expected):
        raise UserError(f"{where} is {type(value).__name__}")
    if is_dataclass(kind):
        return _build(kind, value, where)
    if origin is list:
        return [read_as(inner[0], item, where) for item in value]
    if origin is dict:
        return {name: read_as(inner[1], item, f"{where}.{name}") for name, item in value.items()}
    return value


def _build(kind: Any, value: Mapping[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    found = {f.name: read_as(hints[f.name], value[f.name], f.name) for f in fields(kind) if f.name in value}
    for f in fields(kind):
        if f.name not in found and f.default is MISSING and f.default_factory is MISSING:
            raise UserError(f"{where} has no {f.name}")
    return kind(**found)
