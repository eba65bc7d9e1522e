"""What a model is worth: perplexity on every text, tasks, who is routed where; and what it writes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from dive.eval.evaluate import EvaluationTexts, evaluate
from dive.eval.generation import Beginnings, continue_greedily
from dive.eval.routing import routing_share
from dive.eval.tasks import TaskSuite
from dive.model.recipe import Model
from dive.store import HasStore, Place, step, write_json
from dive.together import ranks, shared_step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@shared_step("evaluation", "perplexity, and which experts the tokens go to")
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
        found["routing"] = routing_share(ready, first, batch=batch, ranks=ranks()).summary()
    if not place.writes:
        return
    if tasks.tasks:
        found["tasks"] = tasks.measure(run, model)
    write_json(place.directory / "evaluation.json", found)


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
