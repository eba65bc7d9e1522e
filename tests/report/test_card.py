"""The model card: what the hub reads of it, what people do, and what is added when it is published."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dive.engines.verified import ABSENT, DIFFERS, EQUAL, EngineResult, Verified
from dive.report.card import WIDGET, engine_table, hub_data_sets, hub_name, model_card, publish, serving
from dive.results import Results
from tests.report.made import results, stage

CONFIG = {"model": {"name": "m", "path": "a/m"}, "moe": {"experts": 2, "top_k": 1}, "pruning": {"ratio": 0.5}}
SIZES = dict.fromkeys(("dense", "total", "active", "trained"), 1)
SHARE = {"law": [0.7, 0.3], "code": [0.1, 0.9], "news": [0.5, 0.5], "maths": [0.2, 0.8]}
EVIL = "<script>alert(1)</script> [x](http://y) **b** `c` | d\n\n# e\n---\nlicense: mit\n```\n<img src=x onerror=f()>"
HUB = {
    "calibration_domains": {"source": "hub", "hub": {"law": {"path": "o/law"}, "code": {"path": "o/code"}}},
    "retrain": {"stages": {"retrain": {"text": "corpus"}}, "corpus": {"source": "hub", "hub": {"path": "o/edu"}}},
}


def made(config: dict[str, Any] | None = None, **parts: Any) -> Results:
    """Of a finished run."""
    return results(CONFIG | (config or {}), **{"groups": [], "parameters": SIZES, "routing": {}} | parts)


def verified(*engines: EngineResult, texts: str = "test texts") -> Verified:
    figures = {"predicted": 2040, "continuations": 8, "tokens": 16, "tolerance": 1e-3}
    return Verified(
        checkpoint="checkpoint",
        model="MixtralForCausalLM",
        texts=texts,
        date="2026-11-27",
        engines=list(engines),
        **figures,
    )


@pytest.mark.parametrize("base", [None, ModelCardData(license="other", license_name="own", language=["en", "de"])])
def test_the_header_is_what_the_hub_shows(base: ModelCardData | None) -> None:
    tasks = {"piqa": {"acc,none": 0.51239, "acc_stderr,none": 0.1}, "own": {"bits,none": float("nan")}}
    asked = {"limit": None, "metric": None, "members": [], "questions": 40}
    found = made(
        HUB,
        evaluation={"domains": ["law"], "sets": [], "tasks": {n: asked | {"shots": 5} for n in tasks}},
        stages=[stage("dense", 9.0), stage("retrain", 8.12346, tasks=tasks, tasks_mean=0.5)],
        generations=[{"domain": "law", "prompt": "The\ntenant", "reference": "", "dense": "", "moe": ""}],
    )
    card = ModelCard(model_card(found, base=base))
    data = card.data
    assert (data.base_model, data.base_model_relation) == ("a/m", "finetune")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["mixture-of-experts", "pruning", "dive"]
    assert data.datasets == ["o/law", "o/edu"]
    assert data.widget == [{"text": "The tenant", "example_title": "law"}]
    known = (None, None, None) if base is None else ("other", "own", ["en", "de"])
    assert (data.license, data.get("license_name"), data.get("language")) == known
    perplexity, task = data.eval_results
    assert isinstance(task, EvalResult)
    assert (perplexity.metric_type, perplexity.metric_value) == ("perplexity", 8.1235)
    assert (task.dataset_type, task.metric_type, task.metric_value) == ("piqa", "accuracy", 0.5124)
    assert task.dataset_args == {"num_few_shot": 5}
    assert data.model_name == "Mixture-of-Experts from m"
    assert str(ModelCard(str(card))) == str(card)


def test_nothing_is_said_that_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    config = {"model": {"name": "local", "path": str(tmp_path / "mine")}, "calibration_domains": {"source": "local"}}
    given = [{"domain": "d", "prompt": "Our secret", "reference": "", "dense": "", "moe": ""}]
    data = ModelCard(model_card(made(config, parameters={}, generations=given, stages=[stage("dense", 9.0)]))).data
    found = data.to_dict()
    assert set(found) == {"library_name", "pipeline_tag", "tags", "widget"}
    assert found["widget"] == [{"text": WIDGET, "example_title": "any text"}]


def test_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert hub_name("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"
    assert hub_name("/cache/models--org--Some-Model/snapshots/0123abc") == "org/Some-Model"
    assert [hub_name(path) for path in ("models/mine", "embedded", "/x/y", "./x", "a/b/c", "x.gguf")] == [None] * 6


def test_data_sets_are_those_that_were_read() -> None:
    measured = {"domains": ["law", "code"], "sets": [], "tasks": {}}
    assert hub_data_sets(made(HUB, evaluation=measured)) == ["o/law", "o/code", "o/edu"]
    untrained = HUB | {"retrain": HUB["retrain"] | {"stages": {}}}
    assert hub_data_sets(made(untrained, evaluation=measured)) == ["o/law", "o/code"]
    of_domains = {"stages": {"retrain": {"text": "calibration"}}, "corpus": {"hub": {"path": "o/edu"}}}
    assert hub_data_sets(made({"retrain": of_domains})) == []


def test_the_card_names_the_domains_of_experts_whatever_they_began_with() -> None:
    card = model_card(results(CONFIG, groups=[], parameters=SIZES, routing={"share": SHARE}))
    assert "- expert 0: law 70%, news 50%, maths 20%\n- expert 1: code 90%, maths 80%, news 50%\n" in card
    groups = [["law", "news"], ["code", "maths"]]
    grouped = model_card(results(CONFIG, groups=groups, parameters=SIZES, routing={"share": SHARE}))
    assert "## Domains of each expert\n\n- expert 0: law, news\n- expert 1: code, maths\n" in grouped
    assert "expert 0" not in model_card(results(CONFIG, groups=[], parameters=SIZES, routing={}))


@pytest.mark.parametrize("grouped", [True, False])
def test_the_card_has_no_markup_of_its_data(grouped: bool) -> None:
    config = json.loads(json.dumps(CONFIG)) | {"eval": {"sets": {EVIL: {"path": EVIL}}}}
    config["model"] = {"name": EVIL, "path": EVIL}
    groups = [[EVIL], ["law"]] if grouped else []
    card = model_card(
        results(config, groups=groups, parameters=SIZES, routing={"share": {EVIL: [1, 0], "law": [0, 1]}})
    )
    assert not re.search(r"<\s*[a-z/!]", card, flags=re.IGNORECASE)
    for line in card.split("## Configuration")[0].splitlines()[5:]:
        assert not re.search(r"(?<!\\)[`*\[]", line)
        assert not line.startswith("# e")
    (fence, block) = re.findall(r"^(`{3,})json\n(.*?)^\1$", card, flags=re.MULTILINE | re.DOTALL)[0]
    assert json.loads(block) == config
    assert card.rstrip().endswith(fence)


def test_the_card_says_what_stands_beside_the_experts_and_where_it_is_not_served() -> None:
    config = json.loads(json.dumps(CONFIG))
    plain = model_card(results(config, groups=[], parameters=SIZES, routing={}))
    assert "shared expert" not in plain.split("## Configuration")[0]
    assert "Not in every engine" not in plain
    config["moe"] |= {"shared_expert": 0.25, "dense_layers": [0, 29]}
    notes = ["llama.cpp knows no dense layers in this class."]
    card = model_card(results(config, groups=[], parameters=SIZES, routing={}), notes)
    assert "25% of what is left of it is one shared expert, which every token meets. Layers 0, 29 stay dense" in card
    assert "> **Not in every engine.** llama.cpp knows no dense layers in this class.\n" in card


@pytest.mark.parametrize(
    ("unserved", "served"),
    [
        (set(), ["vLLM", "SGLang", "llama.cpp"]),
        ({"SGLang"}, ["vLLM", "llama.cpp"]),
        ({"vLLM", "SGLang", "llama.cpp"}, []),
    ],
)
def test_only_engines_that_serve_it_are_named(unserved: set[str], served: list[str]) -> None:
    text = "\n".join(serving("me/my-moe", unserved))
    assert 'AutoModelForCausalLM.from_pretrained("me/my-moe", dtype="auto")' in text
    assert re.findall(r"^([\w.]+):$", text, flags=re.MULTILINE) == served
    assert ("vllm serve me/my-moe\n" in text) == ("vLLM" in served)
    assert ("convert_hf_to_gguf.py my-moe --outtype f16" in text) == ("llama.cpp" in served)


def test_what_engines_made_of_it_is_published_and_what_the_owner_wrote_stays() -> None:
    found = verified(
        EngineResult(engine="vllm", verdict=EQUAL, version="0.32.0", difference=8.4e-6, perplexity=31.863, equal=8),
        EngineResult(engine="llama_cpp", verdict=DIFFERS, version="0.3.36", reason=EVIL, difference=0.41),
        EngineResult(engine="sglang", verdict=ABSENT, reason="pip install sglang"),
        texts=EVIL,
    )
    card = ModelCard(model_card(made()))
    published = publish(card.text, "me/moe", unserved=set(), verified=found)
    assert published.index("## Serving") < published.index("## In other engines") < published.index("## Configuration")
    assert "| vllm | 0.32.0 | 8.4e-06 | 31.8630 | 8 of 8 | equal |" in published
    assert "vllm serve me/moe" in published
    assert "llama.cpp:" not in published  # it was found to differ
    assert "sglang |" not in published
    rows = [line for line in engine_table(found) if line.startswith("|")]
    assert len(rows) == 4
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {7}
    assert not re.search(r"<\s*[a-z/!]", published.split("## Configuration")[0], flags=re.IGNORECASE)
    assert publish(published, "me/moe", unserved=set(), verified=found) == published
    own = "\n# Mine\n\n## Serving\n\nAs you like.\n"
    assert publish(own, "me/moe", unserved=set(), verified=None).strip() == own.strip()
    assert publish("\n# Mine\n", "me/moe", unserved=set(), verified=None).startswith("\n# Mine\n\n## Serving\n")
