"""What a model is worth: perplexity on every text, tasks, who is routed where; and what it writes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from dive.eval.evaluate import EvaluationTexts, evaluate
from dive.eval.generation import Beginnings, continue_greedily
from dive.eval.routing import experts_of_tokens, routing_share
from dive.eval.tasks import TaskSuite
from dive.model.recipe import Model
from dive.store import HasStore, Place, step, write_json
from dive.together import ranks, shared_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLLOWED = 64
"""Tokens of each domain's first test window whose experts are kept, to be looked at."""


@shared_step("evaluation", "perplexity, and which experts the tokens go to", version=2)
def measure(
    place: Place, run: HasStore, name: str, batch: int, *, model: Model, texts: EvaluationTexts, tasks: TaskSuite
) -> None:
    """``evaluation.json``: perplexities and tasks of one model, and its routing if it has routers.

    Args:
        name: of the stage, for messages.
        batch: windows per forward pass.
    """
    ready = model.load()
    found: dict[str, object] = {"perplexity": evaluate(ready, texts, batch=batch, description=name, ranks=ranks())}
    if model.routed and texts.domains:
        first = next(iter(texts.domains.values()))
        routing = routing_share(ready, first, batch=batch, ranks=ranks()).summary()
        found["routing"] = routing | {"texts": follow(ready, first) if place.writes else None}
    if not place.writes:
        return
    if tasks.tasks:
        found["tasks"] = tasks.measure(run, model)
    write_json(place.directory / "evaluation.json", found)


def follow(model: "PreTrainedModel", windows: Mapping[str, Tensor]) -> list[dict[str, object]] | None:
    """{domain, ids, experts} of the beginning of each domain's first window (N, T) int64; none of a single expert.

    ``experts`` has a line for each layer that has experts: the number of each token's likeliest one, separated by spaces.
    """
    if int(model.config.num_experts) == 1:
        return None
    texts: list[dict[str, object]] = []
    for domain, matrix in windows.items():
        ids = matrix[0, :FOLLOWED]
        lines = [" ".join(map(str, layer)) for layer in experts_of_tokens(model, ids).T.tolist()]
        texts.append({"domain": domain, "ids": ids.tolist(), "experts": lines})
    return texts


@step("continuations", "how the model goes on with test texts")
def continue_prompts(
    place: Place, run: HasStore, *, model: Model, prompts: Tensor, tokens: int, end: int | None
) -> None:
    """``continuations.json``: the token ids by which a model goes on, greedily."""
    write_json(place.directory / "continuations.json", continue_greedily(model.load(), prompts, tokens=tokens, end=end))


def write_on(
    run: HasStore,
    models: Mapping[str, Model],
    beginnings: Beginnings,
    tokenizer: "PreTrainedTokenizerBase",
) -> list[dict[str, str]]:
    """The same beginnings continued by each model, as text: rows of domain, prompt, reference and each model's name."""

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    rows = [
        {"domain": domain, "prompt": text(prompt.tolist()), "reference": text(reference.tolist())}
        for domain, prompt, reference in zip(beginnings.domains, beginnings.prompts, beginnings.references, strict=True)
    ]
    tokens, end = beginnings.references.shape[1], tokenizer.eos_token_id
    for name, model in models.items():
        artifact = continue_prompts(run, model=model, prompts=beginnings.prompts, tokens=tokens, end=end)
        for row, ids in zip(rows, artifact.read("continuations.json"), strict=True):
            row[name] = text(ids)
    return rows
