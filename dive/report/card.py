"""The model card of an export: what a run knows of it, and what is added when it is published."""

import math
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dive.engines.quantised import Quantised
from dive.engines.table import figures
from dive.engines.verified import ABSENT, DIFFERS, Verified
from dive.eval.tasks import headline
from dive.report.text import asked_with, fenced_json, markdown, model_name
from dive.results import Results, StageResult
from dive.units import count, size

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

TAGS = ("mixture-of-experts", "pruning", "dive")
INHERITED = ("license", "license_name", "license_link", "language")
"""What a model has from its base model's card."""
METRICS = {"acc": "accuracy", "acc_norm": "accuracy"}
"""Names of the hub for those of lm-evaluation-harness, where they differ."""
WIDGET = "Once upon a time"
"""To be continued on the model's page where the run's own texts are nobody else's business."""
SERVING, ENGINES, QUANTISED = "## Serving", "## In other engines", "## Quantised"


def metadata(results: Results, base: "ModelCardData | None" = None) -> "ModelCardData":
    """What the hub reads of a card, its YAML header."""
    from huggingface_hub import ModelCardData

    settings = results.settings
    base_model = hub_name(str(settings["model.path"]))
    measured = evaluation_results(results)
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model is not None and results.parameters.trained else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(TAGS),
        datasets=hub_data_sets(results) or None,
        widget=[{"text": _line(text), "example_title": _line(title)} for text, title in widget_texts(results)],
        model_name=f"Mixture-of-Experts from {_line(model_name(settings))}" if measured else None,
        eval_results=measured or None,
    )
    for name in INHERITED:
        value = None if base is None else base.get(name)
        if value is not None:
            data[name] = value
    return data


def _line(text: object) -> str:
    return " ".join(str(text).split())


def hub_name(path: str) -> str | None:
    """``owner/name`` of what was read from the hub, or from its cache; none of directories and files of one's own."""
    found = Path(path)
    if found.parent.name == "snapshots":  # of the hub's cache: models--OWNER--NAME/snapshots/COMMIT
        _, *parts = found.parents[1].name.split("--")
        path = "/".join(parts)
    elif found.expanduser().exists():
        return None
    return path if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) else None


def hub_data_sets(results: Results) -> list[str]:
    """Names on the hub of what experts were calibrated and retrained on."""
    config, found = results.run.config, []
    domains = config.get("calibration_domains") or {}
    if domains.get("source") == "hub":
        used = set(results.evaluation.domains)
        found += [entry["path"] for name, entry in (domains.get("hub") or {}).items() if name in used]
    retrain = config.get("retrain") or {}
    corpus = retrain.get("corpus") or {}
    reads = any(stage.get("text", "corpus") == "corpus" for stage in (retrain.get("stages") or {}).values())
    if reads and corpus.get("source") in (None, "hub") and corpus.get("path") is None:
        found.append((corpus.get("hub") or {}).get("path") or "")
    named = r"\w[\w.-]*(/\w[\w.-]*)?"
    return list(dict.fromkeys(path for path in found if re.fullmatch(named, path) and not Path(path).exists()))


def widget_texts(results: Results) -> list[tuple[str, str]]:
    """(text, its domain) to try the model on: of published domains those that the run went on from."""
    published = results.settings.get("calibration_domains.source") in ("embedded", "hub")
    shown = [(each.prompt, each.domain) for each in results.generations or () if each.prompt.strip()]
    return shown if published and shown else [(WIDGET, "any text")]


def evaluation_results(results: Results) -> "list[EvalResult]":
    """Of the model that is exported, the last one measured: its mean perplexity, and one metric of each task."""
    from huggingface_hub import EvalResult

    if not results.stages or results.stages[-1] in (results.dense, results.pruned):
        return []
    stage, found = results.stages[-1], []
    result = partial(EvalResult, task_type="text-generation", task_name="Text Generation")
    if math.isfinite(stage.perplexity.get("mean", math.nan)):
        domains = len(results.evaluation.domains)
        found.append(
            result(
                dataset_type="test-texts",
                dataset_name=f"Test texts of {domains} domains",
                metric_type="perplexity",
                metric_name="Perplexity, geometric mean over the domains",
                metric_value=round(stage.mean, 4),
            )
        )
    for name, metrics in (stage.tasks or {}).items():
        if not metrics:
            continue
        asked = asked_with(results.evaluation.tasks, name)
        metric, value = headline(metrics, None if asked is None else asked.metric)
        kind = metric.partition(",")[0]
        if not math.isfinite(value):
            continue
        shots = None if asked is None or asked.shots is None else {"num_few_shot": asked.shots}
        found.append(
            result(
                dataset_type=_line(name),
                dataset_name=_line(name),
                dataset_args=shots,
                metric_type=METRICS.get(kind, kind),
                metric_name=_line(metric),
                metric_value=round(value, 4),
            )
        )
    return found


def publish(card: str, repo: str, *, unserved: set[str], verified: Verified | None) -> str:
    """The card's Markdown with how to serve it from the hub and what engines made of it, ahead of its configuration.

    A section that stands there already is its owner's, and stays.

    Args:
        card: Markdown behind the header.
        repo: ``user/name``.
        unserved: engines that do not serve it rightly, of ``vLLM``, ``SGLang`` and ``llama.cpp``.
        verified: what ``python -m dive.verify`` found of this export.
    """
    wrong = {each.engine for each in verified.of(DIFFERS)} if verified is not None else set()
    sections = [(SERVING, serving(repo, unserved | {ENGINE_NAMES[engine] for engine in wrong}))]
    if verified is not None:
        sections.append((ENGINES, engine_table(verified)))
    return _ahead(card, sections)


def _ahead(card: str, sections: Sequence[tuple[str, Sequence[str]]]) -> str:
    """The card with sections, (title, lines), ahead of its configuration; one whose title stands there already is left out."""
    there = set(re.findall(r"^## .*$", card, flags=re.MULTILINE))
    added = "".join("\n".join([title, "", *lines, "", ""]) for title, lines in sections if title not in there)
    before, title, after = card.partition("## Configuration\n")
    return before + added + title + after if title else f"{card.rstrip()}\n\n{added}"


ENGINE_NAMES = {"transformers": "transformers", "vllm": "vLLM", "sglang": "SGLang", "llama_cpp": "llama.cpp"}
"""As people write what :mod:`dive.verify` calls them."""


def serving(repo: str, unserved: set[str]) -> list[str]:
    """Lines of Markdown: how each engine that serves it rightly is started.

    Args:
        repo: ``user/name``.
        unserved: engines that are left out.
    """
    name = repo.partition("/")[2]
    commands = {
        "vLLM": [f"vllm serve {repo}"],
        "SGLang": [f"python -m sglang.launch_server --model-path {repo}"],
        "llama.cpp": [
            f"hf download {repo} --local-dir {name}",
            f"python llama.cpp/convert_hf_to_gguf.py {name} --outtype f16 --outfile {name}-f16.gguf",
            f"llama-server -m {name}-f16.gguf",
        ],
    }
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
        f'model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto")',
        f'inputs = tokenizer("{WIDGET}", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
        "```",
    ]
    for engine, shell in commands.items():
        if engine not in unserved:
            lines += ["", f"{engine}:", "", "```bash", *shell, "```"]
    return lines


def engine_table(verified: Verified) -> list[str]:
    """Lines of Markdown: what every engine that was there made of the same tokens."""
    lines = [
        f"Log-probabilities of {verified.predicted:,} tokens of {markdown(verified.texts)} beside those of transformers, and "
        f"continuations of {verified.tokens} tokens, in float32; {markdown(verified.date)}.",
        "",
        "| engine | version | largest difference, nats | perplexity | continuations equal | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for found in verified.engines:
        if found.verdict == ABSENT:
            continue
        reason = f": {found.reason}" if found.verdict == DIFFERS and found.reason else ""
        cells = (found.engine, found.version or "–", *figures(verified, found), f"{found.verdict}{reason}")
        lines.append(f"| {' | '.join(map(markdown, cells))} |")
    return lines


def quantised_card(card: "ModelCard", made: Quantised) -> "ModelCard":
    """The card of an export as that of what was quantised from it: how, and what it costs, ahead of its configuration.

    Figures of the run are those of the export, so that the header keeps none.
    """
    quantised = deepcopy(card)
    data = quantised.data
    data["eval_results"] = data["model_name"] = None
    data["tags"] = [*(data.get("tags") or []), made.scheme, "gguf" if made.is_gguf else "compressed-tensors"]
    if data.get("base_model") is not None:
        data["base_model_relation"] = "quantized"
    if made.is_gguf:
        data["library_name"] = "gguf"
    quantised.text = _ahead(quantised.text, [(QUANTISED, quantised_lines(made))])
    return quantised


def published_variant(card: "ModelCard", made: Quantised, repo: str, *, base: str) -> "ModelCard":
    """The card of what was quantised as it is published, with how it is served.

    Args:
        repo: ``user/name`` of its own.
        base: of the export.
    """
    published = deepcopy(card)
    published.data["base_model"], published.data["base_model_relation"] = base, "quantized"
    name = repo.partition("/")[2]
    if made.is_gguf:
        file = f"model-{made.scheme}.gguf"
        lines = ["```bash", f"hf download {repo} {file} --local-dir {name}", f"llama-server -m {name}/{file}", "```"]
    else:
        lines = serving(repo, {"llama.cpp"})
    published.text = _ahead(published.text, [(SERVING, lines)])
    return published


def quantised_lines(made: Quantised) -> list[str]:
    """Lines of Markdown: how the weights are stored, and perplexity before and after."""
    kept = "" if made.is_gguf else " Head, routers and norms are as they were."
    texts = f"perplexity, {made.predicted:,} tokens of {markdown(made.texts)}"
    lines = [
        f"{markdown(made.how)}.{kept} By {markdown(made.made_by)}, {markdown(made.date)}.",
        "",
        "| | export | quantised |",
        "| --- | --- | --- |",
        f"| weights | {size(made.bytes_before)} | {size(made.bytes_after)} |",
        f"| {texts} | {made.perplexity_before:.4f} | {made.perplexity_after:.4f} |",
        "",
        f"The first is of transformers in float32, the second of {markdown(made.measured_in)} with what is stored here.",
    ]
    if made.calibrated:
        lines += ["", f"{markdown(made.calibrated)}."]
    if made.trouble:
        lines += ["", f"transformers does not load it as it is: {markdown(made.trouble)}"]
    return lines


def _domains_of_experts(results: Results) -> list[str]:
    """Section of the card: the groups that experts began with, or else the three domains that use each of them most."""
    if results.groups:
        listed = [
            f"- expert {number}: {', '.join(map(markdown, group))}" for number, group in enumerate(results.groups)
        ]
        return ["## Domains of each expert", "", *listed, ""]
    share = results.share
    listed = []
    for number in range(len(next(iter(share.values()), []))):
        most = sorted(share, key=lambda domain: -share[domain][number])[:3]
        listed.append(
            f"- expert {number}: {', '.join(f'{markdown(domain)} {share[domain][number]:.0%}' for domain in most)}"
        )
    return ["## Share of a domain's tokens that each expert gets, the largest three", "", *listed, ""] if listed else []


def lost(precision: str) -> str:
    """What is said of a model that came from a GGUF file."""
    return f"The dense model was de-quantised from a GGUF file ({precision}): what its weights had beyond that is lost."


def model_card(results: Results, notes: Sequence[str] = (), *, base: "ModelCardData | None" = None) -> str:
    """README.md of an export: what it is, the domains of each expert, results, configuration.

    Args:
        notes: on engines that do not serve it.
        base: of the dense model's own card, which licence and languages are taken from.
    """
    config, settings, counts = results.run.config, results.settings, results.parameters
    sizes = (counts.dense, counts.total, counts.active, counts.trained)
    lines = [
        "---",
        metadata(results, base).to_yaml(),
        "---",
        "",
        f"# Mixture-of-Experts from {markdown(model_name(settings))}",
        "",
        f"{settings['moe.experts']} experts, {settings['moe.top_k']} active per token; each is the dense model's FFN with "
        f"{settings['pruning.ratio']:.0%} of its channels pruned. Made by pruning and reconstruction after DIVE "
        "(ACL 2025, arXiv 2506.09351)." + _beside_experts(settings),
        *([] if not notes else ["", "> **Not in every engine.** " + " ".join(notes)]),
        *([] if results.run.precision is None else ["", lost(results.run.precision)]),
        "",
        "| parameters | dense | total | active | trained |",
        "| --- | --- | --- | --- | --- |",
        "| | " + " | ".join("–" if size is None else count(size) for size in sizes) + " |",
        "",
        *_domains_of_experts(results),
        "## Perplexity",
        "",
        "Geometric mean over the domains' test texts, non-overlapping windows.",
        "",
        "| stage | perplexity | retraining tokens |",
        "| --- | --- | --- |",
        *(f"| {markdown(s.name)} | {s.mean:.2f} | {_tokens(s)} |" for s in results.stages),
        "",
        "## Configuration",
        "",
        *fenced_json(config),
        "",
    ]
    return "\n".join(lines)


def _tokens(stage: StageResult) -> str:
    return f"{stage.tokens:,} (calibration)" if stage.calibration else f"{stage.tokens:,}"


def _beside_experts(settings: Mapping[str, Any]) -> str:
    """What a token meets beside its experts; settings of older runs lack these."""
    found = ""
    if settings.get("moe.shared_expert") and settings["moe.experts"] > 1:
        found += (
            f" {settings['moe.shared_expert']:.0%} of what is left of it is one shared expert, which every token meets."
        )
    if settings.get("moe.dense_layers"):
        layers = ", ".join(map(str, settings["moe.dense_layers"]))
        found += f" Layers {layers} stay dense, numbered from 0."
    return found
