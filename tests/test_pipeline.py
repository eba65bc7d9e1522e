"""The whole method on a tiny model: what a run leaves behind, and what a second one does not do again."""

import errno
import json
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM, PreTrainedTokenizerFast

import dive
from dive import store
from dive.affinity.grouping import adjusted_rand_index, favourite_groups
from dive.calibration_domains.local import read_documents
from dive.calibration_domains.sampling import evaluation_windows
from dive.errors import UserError
from dive.eval.perplexity import perplexity
from dive.model.load import document_tokens
from dive.moe import build as building
from dive.pipeline import train
from dive.report.run import read_curves
from tests.conftest import Build
from tests.workplace import WORDS, Workplace


@pytest.fixture(scope="module")
def finished(workplace: Workplace) -> Path:
    """Directory of a finished run with the defaults."""
    workplace.run("first")
    return workplace.root / "first"


def test_results_have_the_documented_shape(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert [s["name"] for s in results["stages"]] == ["dense", "pruned", "reconstructed", "router", "retrain"]
    assert [s["tokens"] for s in results["stages"]] == [0, 0, 0, 512, 3072]
    assert sorted(d for group in results["groups"] for d in group) == sorted(WORDS)
    for stage in results["stages"]:
        values = [stage["perplexity"][f"{domain}@32"] for domain in WORDS]
        assert stage["perplexity"]["mean"] == pytest.approx(math.exp(sum(map(math.log, values)) / 4))
    assert {"dense", "total", "active", "trained"} <= set(results["parameters"])
    assert {"versions", "seed", "fingerprints", "config", "command", "samples"} <= set(results["run"])
    assert set(results["routing"]["share"]) == set(WORDS)
    for shares in results["routing"]["share_by_layer"].values():
        assert [sum(layer) for layer in shares] == pytest.approx([1.0, 1.0])
    assert results["overlap"][0][0] == 1.0
    for text in results["routing"]["texts"]:
        assert len(text["tokens"]) == len(text["ids"]) == 32
        assert [len(line.split()) for line in text["experts"]] == [32] * len(results["routing"]["layers"])
    known = [token for expert in results["routing"]["tokens"] for token in expert]
    assert all(token["lift"] > 1 and token["text"] for token in known)


def test_retraining_lowers_perplexity_on_learnable_text(finished: Path) -> None:
    stages = {s["name"]: s["perplexity"]["mean"] for s in json.loads((finished / "results.json").read_text())["stages"]}
    assert stages["retrain"] < 0.9 * stages["reconstructed"]


def test_parameters_are_those_of_the_export(finished: Path) -> None:
    counted = json.loads((finished / "results.json").read_text())["parameters"]
    moe = AutoModelForCausalLM.from_pretrained(finished / "checkpoint")
    total = sum(p.numel() for p in moe.parameters())
    one_expert = 2 * 3 * 32 * 24  # layers × projections × D × W
    assert counted["total"] == total
    assert counted["active"] == total - one_expert  # one of two experts is active
    # routers 2·2·32, norms (2·2 + 1)·32, LoRA of rank 8 on gate, up and down of 2 experts in 2 layers
    assert counted["trained"] == 128 + 160 + 2 * 2 * 3 * 8 * (32 + 24)


def test_what_was_planned_stands_beside_what_it_took(finished: Path) -> None:
    found = json.loads((finished / "results.json").read_text())
    planned, actual = found["plan"]["planned"], found["plan"]["actual"]
    assert [s["name"] for s in planned["stages"]] == [
        *("calibration", "mining", "pruned", "reconstructed", "router", "retrain", "evaluation", "export")
    ]
    assert {s["name"] for s in actual["stages"]} == {s["name"] for s in planned["stages"]}
    for name in ("total", "active", "trained"):
        assert planned["parameters"][name] == found["parameters"][name]
    tokens = {s["name"]: s["tokens"] for s in planned["stages"]}
    assert all(tokens[s["name"]] == s["tokens"] for s in found["stages"] if s["tokens"])
    # headers and the tokenizer's files weigh a little in a model of 20 thousand parameters, and nothing in a real one
    experts = [next(s for s in side["stages"] if s["name"] == "reconstructed") for side in (planned, actual)]
    assert experts[0]["disk_bytes"] == pytest.approx(experts[1]["disk_bytes"], rel=0.1)
    assert actual["host_bytes"] > 1e8


def test_every_file_is_there(finished: Path) -> None:
    for name in ("config.yaml", "results.json", "checkpoint/README.md", "plots/affinity.png", "plots/routing.png"):
        assert (finished / name).stat().st_size > 0
    assert (finished / "plots/loss.png").read_bytes().startswith(b"\x89PNG")
    assert "retrain/loss" in (finished / "csv/retrain/metrics.csv").read_text()


def test_the_export_is_a_stock_model_with_the_last_stages_perplexity(finished: Path, workplace: Workplace) -> None:
    moe, report = AutoModelForCausalLM.from_pretrained(finished / "checkpoint", output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(finished / "checkpoint")
    assert type(moe) is MixtralForCausalLM
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    results = json.loads((finished / "results.json").read_text())
    documents = read_documents(workplace.root / "domains/cats/test.jsonl", field="text", where="test")
    windows = evaluation_windows(
        documents, lambda text: document_tokens(tokenizer, text), length=32, windows=3, name="cats"
    )
    assert perplexity(moe, windows) == pytest.approx(results["stages"][-1]["perplexity"]["cats@32"], rel=1e-4)
    text = tokenizer.decode(moe.generate(**tokenizer("the cat", return_tensors="pt"), max_new_tokens=4)[0])
    assert text.startswith("the cat")


def test_only_what_the_policy_names_has_changed(finished: Path, workplace: Workplace) -> None:
    dense, _ = dive.load_dense(str(workplace.root / "dense"))
    before = dict(dense.named_parameters())
    after = dict(AutoModelForCausalLM.from_pretrained(finished / "checkpoint").named_parameters())
    changed = {name for name, value in after.items() if name in before and not torch.equal(value, before[name])}
    assert changed == {name for name in before if "norm" in name}


def test_the_same_run_again_computes_nothing(
    finished: Path, workplace: Workplace, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="dive"):
        again = workplace.run("again")
    assert not [r.getMessage() for r in caplog.records if "computing" in r.getMessage()]
    assert all(stage["reused"] for stage in again["stages"])
    first = json.loads((finished / "results.json").read_text())
    assert [s["perplexity"] for s in again["stages"]] == [s["perplexity"] for s in first["stages"]]
    logged = [(workplace.root / name / "csv/retrain/metrics.csv").read_text() for name in ("first", "again")]
    assert sorted(logged[0].splitlines()[0].split(",")) == sorted(logged[1].splitlines()[0].split(","))
    assert logged[0].count("\n") == logged[1].count("\n")
    weights = [load_file(workplace.root / name / "checkpoint/model.safetensors") for name in ("first", "again")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_same_run_in_another_store_gives_the_same_numbers(
    finished: Path, workplace: Workplace, tmp_path: Path
) -> None:
    again = workplace.run("elsewhere", f"store={tmp_path / 'store'}")
    first = json.loads((finished / "results.json").read_text())
    assert not any(stage["reused"] for stage in again["stages"])
    assert [s["perplexity"] for s in again["stages"]] == [s["perplexity"] for s in first["stages"]]


def test_another_number_of_experts_reuses_calibration_and_mining(
    finished: Path, workplace: Workplace, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="dive"):
        workplace.run("three", "moe.experts=3")
    messages = [r.getMessage().split() for r in caplog.records if r.name == "dive.store"]
    computed = {words[words.index("computing") - 2] for words in messages if "computing" in words}
    assert {"retrained", "evaluation"} <= computed
    assert not computed & {"statistics", "matrix"}


@pytest.mark.parametrize(
    "overrides",
    [
        ["affinity=random", "moe.top_k=2"],
        ["affinity=given", "affinity.groups=[[sums,code],[cats,news]]"],
        ["moe=random_split", "moe.experts=2", "pruning.metric=wifv", "pruning.compensation=none"],
        pytest.param(["moe=upcycle", "moe.experts=2", "moe.top_k=2"], marks=pytest.mark.slow),
        pytest.param(["moe=coactivation", "moe.experts=3"], marks=pytest.mark.slow),
        pytest.param(
            ["moe=coactivation", "moe.experts=2", "moe.top_k=2", "pruning=wanda_sp", "pruning.ratio=0.75"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["moe=plain", "moe.experts=1", "pruning=llm_pruner"], marks=pytest.mark.slow),
        ["moe=plain", "moe.experts=2", "pruning.metric=taylor", "moe.plain.shared=0.25"],
        pytest.param(["moe=plain", "moe.experts=2", "moe.plain.shared=0.5"], marks=pytest.mark.slow),
        pytest.param(["moe.experts=1", "pruning.metric=wifn"], marks=pytest.mark.slow),
        [
            "moe=plain",
            "moe.experts=2",
            "pruning.metric=magnitude",
            "pruning.compensation=none",
            "moe.plain.router_init=random",
        ],
        pytest.param(
            ["moe=plain", "moe.experts=3", "pruning.ridge=null", "pruning.metric=wifv"], marks=pytest.mark.slow
        ),
        ["moe.experts=6", "affinity=default", "moe.top_k=2"],  # more experts than domains
        [
            "retrain.stages.retrain.gate=switch",
            "retrain.stages.retrain.teacher.logits=1",
            "retrain.stages.retrain.teacher.hidden=0.1",
            "retrain.stages.retrain.z_loss=0.001",
        ],
        [
            "retrain.stages.retrain.train.attention=lora",
            "retrain.stages.retrain.train.experts=full",
            "retrain.noise=0.01",
        ],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_other_ways_end_in_a_reloadable_model(workplace: Workplace, overrides: list[str]) -> None:
    name = str(abs(hash(tuple(overrides))))
    short = ["retrain.stages.router.tokens=512", "retrain.stages.retrain.tokens=512"]
    results = workplace.run(name, *short, *overrides)
    assert type(AutoModelForCausalLM.from_pretrained(results["export"])) is MixtralForCausalLM


def test_groups_from_statistics_need_no_evaluation_and_say_how_far_they_agree(
    finished: Path, workplace: Workplace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = json.loads((finished / "results.json").read_text())
    assert first["affinity"]["measure"] == "perplexity"
    assert set(first["affinity"]["agreement"]) == {"importance", "mask_overlap"}
    short = ["~retrain.stages.router", "retrain.stages.retrain.tokens=512"]
    with caplog.at_level(logging.INFO, logger="dive"):
        cheap = workplace.run("importance", "affinity=importance", *short, f"store={tmp_path}")
        again = workplace.run("overlap", "affinity.measure=mask_overlap", *short)
    assert not [r for r in caplog.records if " matrix " in r.getMessage()]
    assert set(cheap["affinity"]["agreement"]) == {"mask_overlap"}
    assert np.array(cheap["affinity"]["similarity"]).shape == (4, 4)
    assert (workplace.root / "importance/plots/affinity.png").stat().st_size > 0
    # In the first run's store the perplexities are there, so the agreement is known both ways.
    assert again["affinity"]["agreement"]["perplexity"] == pytest.approx(first["affinity"]["agreement"]["mask_overlap"])


def test_affinity_is_mapped_where_it_has_no_say(workplace: Workplace) -> None:
    short = ["~retrain.stages.router", "retrain.stages.retrain.tokens=512", "affinity=default", "moe.refined.steps=2"]
    found = workplace.run("mapped", *short)
    assert found["groups"] == []
    mapped = found["affinity"]
    assert (mapped["measure"], sorted(mapped["agreement"])) == ("importance", ["mask_overlap"])
    assert (
        sorted(domain for group in mapped["groups"] for domain in group)
        == sorted(mapped["domains"])
        == sorted(found["routing"]["share"])
    )
    assert len(mapped["groups"]) == 2
    assert (
        adjusted_rand_index(mapped["groups"], favourite_groups(found["routing"]["share"])) == mapped["routing"]["rand"]
    )
    page = (workplace.root / "mapped/report.html").read_text(encoding="utf-8")
    assert "These groups had no say in the experts, which began with tokens" in page
    assert "Groups and the experts that serve them" in page
    without = workplace.run("unmapped", *short, "affinity.mapped=0")
    assert "affinity" not in without
    assert "affinity.mapped is 0" in (workplace.root / "unmapped/report.html").read_text(encoding="utf-8")
    assert [stage["perplexity"] for stage in without["stages"]] == [stage["perplexity"] for stage in found["stages"]]


def test_what_the_model_wrote_calibrates_and_is_read_again(untrained: Workplace, tmp_path: Path) -> None:
    reading = ["retrain=end_to_end", "~retrain.stages.retrain", "retrain.stages.end_to_end.tokens=512"]
    reading += ["retrain.length=32", "retrain.checkpoint_every=100"]
    settings = ["affinity=default", f"store={tmp_path}", "moe.refined.steps=5", *reading]
    settings += ["retrain.stages.end_to_end.batch=4", "retrain.stages.end_to_end.train.experts=full"]
    plain = untrained.run("without", *settings)
    found = untrained.run("with", *settings, "calibration_domains.generated=12")
    assert found["run"]["samples"]["calibration"] == plain["run"]["samples"]["calibration"] | {"generated": [12, 32]}
    assert found["run"]["fingerprints"]["retraining_corpus"] != plain["run"]["fingerprints"]["retraining_corpus"]
    assert sorted(found["evaluation"]["domains"]) == sorted(WORDS)
    stages = {stage["name"]: stage for stage in found["plan"]["actual"]["stages"]}
    assert stages["generated"]["seconds"] > 0
    assert [s["tokens"] for s in found["plan"]["planned"]["stages"] if s["name"] == "generated"] == [12 * 32]
    for before, after in zip(plain["stages"], found["stages"], strict=True):
        assert (before["perplexity"] == after["perplexity"]) == (before["name"] == "dense")
    again = untrained.run("again", *settings, "calibration_domains.generated=12")
    assert all(stage["reused"] for stage in again["plan"]["actual"]["stages"] if stage["name"] != "export")


def test_expert_biases_make_a_custom_directory(workplace: Workplace) -> None:
    results = workplace.run(
        "bias",
        "moe=plain",
        "moe.experts=2",
        "pruning.metric=wifv",
        "pruning.compensation=bias",
        "retrain.stages.retrain.tokens=512",
    )
    directory = Path(results["export"])
    assert directory.name == "checkpoint_with_expert_bias"
    assert not (workplace.root / "bias/checkpoint").exists()
    moe = dive.load_with_expert_bias(directory)
    documents = read_documents(workplace.root / "domains/cats/test.jsonl", field="text", where="test")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    windows = evaluation_windows(
        documents, lambda text: document_tokens(tokenizer, text), length=32, windows=3, name="cats"
    )
    assert perplexity(moe, windows) == pytest.approx(results["stages"][-1]["perplexity"]["cats@32"], rel=1e-4)


def test_qwen3_becomes_qwen3_moe(
    build: Build, tokenizer: PreTrainedTokenizerFast, workplace: Workplace, tmp_path: Path
) -> None:
    build("qwen3").save_pretrained(tmp_path / "qwen3")
    tokenizer.save_pretrained(tmp_path / "qwen3")
    results = workplace.run("qwen3", f"model.path={tmp_path / 'qwen3'}", "retrain.stages.retrain.tokens=512")
    assert type(AutoModelForCausalLM.from_pretrained(results["export"])).__name__ == "Qwen3MoeForCausalLM"


STREAMED = ("model.load=streamed", "retrain=none", "affinity=given", "affinity.groups=[[sums,code],[cats,news]]")


@pytest.mark.parametrize("overrides", [[], ["moe=plain", "moe.experts=2"], ["moe.experts=1"]], ids=" ".join)
def test_streamed_it_writes_the_same_model(untrained: Workplace, tmp_path: Path, overrides: list[str]) -> None:
    name = "-".join(["streamed", *overrides])
    streamed = untrained.run(name, *STREAMED, f"store={tmp_path / 'store'}", *overrides)
    full = untrained.run(f"{name}-full", *STREAMED, "model.load=full", *overrides)
    assert (streamed["stages"], streamed["routing"]) == ([], {})
    assert streamed["evaluation"]["skipped"].startswith("model.load=streamed")
    assert "skipped" not in full["evaluation"]
    assert streamed["timings"]["reconstructed"] > 0
    for key in ("groups", "parameters", "overlap"):
        assert streamed[key] == full[key]
    found, expected = (AutoModelForCausalLM.from_pretrained(results["export"]) for results in (streamed, full))
    weights = expected.state_dict()
    for key, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, weights[key])
    assert not (tmp_path / "store" / "evaluation").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ["affinity=random"],
        ["affinity=default", "model.dtype=bfloat16", "moe.refined.steps=5"],
        pytest.param(
            ["affinity=random", "moe.refined.sequential=false", "moe.refined.steps=5", "model.load=streamed"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["affinity=random", "moe=plain", "pruning.ridge=null"], marks=pytest.mark.slow),
        pytest.param(["affinity=random", "moe=plain", "pruning.metric=taylor"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_an_interrupted_construction_goes_on_after_its_last_whole_layer(
    untrained: Workplace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    overrides: list[str],
) -> None:
    settings = ["retrain=none", "eval.windows=1", *overrides, "moe.experts=2"]
    save = building.save_file

    def stop_in_the_second_layer(tensors: dict[str, torch.Tensor], file: Path, **arguments: object) -> None:
        second = file.name == "unfinished" and (file.parent / "layer_000.safetensors").exists()
        if second and len(tensors["masks"]) == 2:
            file.write_bytes(b"half of it")
            raise KeyboardInterrupt
        save(tensors, file, **arguments)

    monkeypatch.setattr(building, "save_file", stop_in_the_second_layer)
    name = "interrupted-" + "-".join(overrides)
    with pytest.raises(KeyboardInterrupt):
        untrained.run(name, *settings, f"store={tmp_path / 'stopped'}")
    monkeypatch.undo()
    for file in (tmp_path / "stopped" / "partial").rglob("seconds"):
        file.write_bytes(b"")  # as a power cut may leave it: the layers count
    with caplog.at_level(logging.INFO, logger="dive"):
        untrained.run(name, *settings, f"store={tmp_path / 'stopped'}")
    assert "experts: going on after 1 of" in caplog.text
    untrained.run(f"{name}-whole", *settings, f"store={tmp_path / 'whole'}")
    expected = sorted((tmp_path / "whole" / "experts").rglob("layer_*"))
    assert len(expected) >= 2
    for file in expected:
        found = tmp_path / "stopped" / file.relative_to(tmp_path / "whole")
        assert found.read_bytes() == file.read_bytes()
    assert not list((tmp_path / "stopped" / "partial").iterdir())


def test_built_layers_outlive_a_failure_while_they_are_stored(
    untrained: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ["moe=plain", "moe.experts=1", "retrain=none", "eval.windows=1", f"store={tmp_path}"]

    def no_room(file: Path, value: object) -> None:
        if file.name == store.MANIFEST and file.parent.parent.name == "experts":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, value)

    write = store.write_json
    monkeypatch.setattr(store, "write_json", no_room)
    with pytest.raises(UserError, match="make room"):
        untrained.run("full-disk", *settings)
    monkeypatch.undo()
    (place,) = (tmp_path / "partial").iterdir()
    before = float((place / "seconds").read_text())
    with caplog.at_level(logging.INFO, logger="dive"):
        untrained.run("full-disk", *settings)
    assert "experts: going on after 2 of" in caplog.text
    (artifact,) = (tmp_path / "experts").iterdir()
    assert float(json.loads((artifact / store.MANIFEST).read_text())["seconds"]) >= before > 0.0
    assert not place.exists()


def test_a_domain_that_becomes_a_text_apart_leaves_the_mean(untrained: Workplace, tmp_path: Path) -> None:
    settings = ["moe=plain", "moe.experts=1", "retrain=none", f"store={tmp_path}"]
    everything = untrained.run("all-domains", *settings)["stages"][0]["perplexity"]
    news = f"+eval.sets={{news:{{path:{untrained.root}/domains/news/test.jsonl,lengths:[32],separator:null}}}}"
    domains = "calibration_domains.domains=[cats,code,sums]"
    apart = untrained.run("three-domains", *settings, domains, news)["stages"][0]["perplexity"]
    assert apart.pop("mean") == pytest.approx(math.prod(apart[f"{d}@32"] for d in ("cats", "code", "sums")) ** (1 / 3))
    assert everything.pop("mean") == pytest.approx(math.prod(everything.values()) ** (1 / 4))
    assert apart == everything  # of each text the same


@pytest.mark.parametrize("load", ["full", "streamed"])
def test_the_export_has_a_type_of_its_own(untrained: Workplace, build: Build, tmp_path: Path, load: str) -> None:
    build("llama-tied").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    for file in (untrained.root / "dense").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "dense")
    settings = [*STREAMED, f"model.path={tmp_path / 'dense'}", f"model.load={load}"]
    for wanted, expected in (("auto", torch.bfloat16), ("float16", torch.float16), ("null", torch.float32)):
        results = untrained.run(f"dtype-{load}-{wanted}", *settings, f"model.export_dtype={wanted}")
        assert AutoModelForCausalLM.from_pretrained(results["export"], dtype="auto").dtype == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["retrain=two_stages"], r"retraining \(router, retrain\).*retrain=none, or model\.load=full"),
        (["affinity=mined"], r"affinity=mined.*affinity=random"),
        (["moe=plain", "pruning=llm_pruner"], r"pruning\.metric=taylor"),
        (["moe=plain", "pruning=flap", "pruning.compensation=bias"], r"pruning\.compensation=bias"),
        (["eval.tasks=[arc_easy]"], r"eval\.tasks.*python -m dive\.evaluate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_streaming_cannot_do_is_refused(untrained: Workplace, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^model.load=streamed: {message}"):
        untrained.compose("model.load=streamed", "retrain=none", "affinity=random", *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["moe.experts=5"], r"moe\.experts \(5\) exceeds the number of calibration domains \(4\)"),
        (["eval.lengths=[65]"], r"eval\.lengths \(65\) exceeds the 64 positions"),
        (["pruning.width_multiple=128"], r"pruning\.width_multiple \(128\)"),
        (["calibration_domains.samples=9999"], r"calibration_domains\.samples: domain 'cats' has \d+ tokens"),
        (["retrain.stages.retrain.train.head=full"], r"retrain\.stages\.retrain\.train\.head=full"),
        (["affinity=given", "affinity.groups=[[sums],[dogs]]"], r"affinity\.groups: \['dogs'\] not among"),
        (["model.device=cuda:7"], r"model\.device=cuda:7"),
        (["trainer.accelerator=gpu"], "torch finds no GPU"),
        (["calibration_domains.domains=[cats,dogs]"], r"calibration_domains\.domains: \['dogs'\] not among"),
        (["+eval.sets={cats:{path:x.txt}}"], r"eval\.sets"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused(workplace: Workplace, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        workplace.run("refused", *overrides)


def test_evaluation_text_inside_the_calibration_text_is_refused(workplace: Workplace, tmp_path: Path) -> None:
    for domain in ("cats", "news"):
        for split in ("train", "test"):
            source = workplace.root / "domains" / domain / f"{'train' if domain == 'news' else split}.jsonl"
            (tmp_path / domain).mkdir(exist_ok=True)
            (tmp_path / domain / f"{split}.jsonl").write_bytes(source.read_bytes())
    overrides = (f"calibration_domains.path={tmp_path}",)
    with pytest.raises(UserError, match=r"'news': 60 of 60 evaluation documents.*eval\.allow_overlap=true"):
        workplace.run("overlap", *overrides)
    assert workplace.run("overlap", *overrides, "eval.allow_overlap=true")["stages"]


def test_evaluation_text_in_another_domain_or_in_the_corpus_is_refused(workplace: Workplace, tmp_path: Path) -> None:
    for domain in ("cats", "news"):
        shutil.copytree(workplace.root / "domains" / domain, tmp_path / domain)
    corpus = f"retrain.corpus.path={tmp_path / 'cats' / 'test.jsonl'}"
    with pytest.raises(UserError, match="'cats': 20 of 20 evaluation documents"):
        workplace.run("leak", "retrain.corpus.source=local", corpus)
    with (tmp_path / "news/train.jsonl").open("a") as train:
        train.write((tmp_path / "cats/test.jsonl").read_text())
    with pytest.raises(UserError, match="'cats': 20 of 20 evaluation documents"):
        workplace.run("leak", f"calibration_domains.path={tmp_path}")


def test_the_headline_follows_the_order_of_the_lengths(workplace: Workplace) -> None:
    for first, second in ((32, 16), (16, 32)):
        stages = workplace.run(f"lengths-{first}", f"eval.lengths=[{first},{second}]")["stages"]
        assert all(stage["perplexity"]["mean"] == stage["perplexity"][f"mean@{first}"] for stage in stages)


def test_a_stage_can_be_added_on_the_command_line(workplace: Workplace) -> None:
    more = "+retrain.stages={more:{tokens:512,learning_rate:1e-4,train:{norms:full}}}"
    results = workplace.run("more", more)
    assert results["stages"][-1]["name"] == "more"
    assert results["stages"][-1]["trained"] == 160  # (2 · 2 + 1) norms of 32


def test_named_sets_are_measured_beside_the_domains(workplace: Workplace, tmp_path: Path) -> None:
    (tmp_path / "extra.txt").write_text("a cat slept in town while torch sums add up " * 20)
    sets = f"+eval.sets={{extra:{{path:{tmp_path / 'extra.txt'},lengths:[16,64]}}}}"
    stages = workplace.run("sets", sets)["stages"]
    assert all({"extra@16", "extra@64", "mean"} <= set(stage["perplexity"]) for stage in stages)
    train = workplace.root / "domains/cats/train.jsonl"
    with pytest.raises(UserError, match=r"eval\.sets\.leak: 60 of 60 evaluation documents"):
        workplace.run("leak", f"+eval.sets={{leak:{{path:{train},lengths:[16]}}}}")


def test_a_single_expert_is_refined_as_well(workplace: Workplace) -> None:
    short = ["moe.experts=1", "retrain.stages.retrain.tokens=512"]
    found = {
        moe: {s["name"]: s["perplexity"]["mean"] for s in workplace.run(f"one {moe}", f"moe={moe}", *short)["stages"]}
        for moe in ("default", "plain")
    }
    assert found["default"]["pruned"] == found["plain"]["pruned"] == found["plain"]["reconstructed"]
    assert found["default"]["reconstructed"] != found["default"]["pruned"]


def test_learning_from_the_dense_model_comes_closer_to_it(workplace: Workplace) -> None:
    """On the training text itself, the loss from the teacher falls below where it began."""
    settings = ["retrain.stages.retrain.tokens=12288", "retrain.stages.retrain.learning_rate=5e-3"]
    found = {}
    for weight in ("0", "1"):
        results = workplace.run(f"teacher{weight}", *settings, f"retrain.stages.retrain.teacher.logits={weight}")
        found[weight] = results["stages"][-1]["perplexity"]["mean"]
    dense = results["stages"][0]["perplexity"]["mean"]
    # The random dense model knows nothing of the text: whoever learns from it alone stays near it.
    assert abs(found["1"] - dense) < 0.5 * abs(found["0"] - dense)


def test_a_diverging_stage_says_so(workplace: Workplace) -> None:
    config = workplace.compose("trainer.gradient_clip=null")
    config.retrain.stages["retrain"].learning_rate = 1e30  # beyond its bounds, to be sure
    with pytest.raises(
        UserError, match=r"retrain\.stages\.retrain: the loss is .* retrain\.stages\.retrain\.learning_rate"
    ):
        train(config, workplace.root / "diverging", [])


def test_indexed_storage_retrains_to_the_same_model(workplace: Workplace, tmp_path: Path) -> None:
    settings = ["moe=plain", "retrain.stages.retrain.train.experts=lora"]
    one = workplace.run("materialised", *settings)
    other = workplace.run("indexed", *settings, "retrain.storage=indexed")
    for mine, theirs in zip(other["stages"], one["stages"], strict=True):
        assert mine["perplexity"]["mean"] == pytest.approx(theirs["perplexity"]["mean"], rel=1e-4)
    curves = [
        read_curves(workplace.root / name, ["retrain"])[0]["scalars"]["loss"] for name in ("materialised", "indexed")
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert one["parameters"] == other["parameters"]
    exported = [load_file(f"{found['export']}/model.safetensors") for found in (one, other)]
    assert list(exported[0]) == list(exported[1])
    for name, tensor in exported[0].items():  # Adam divides small differences by small ones
        assert (tensor - exported[1][name]).norm() <= 0.02 * tensor.norm(), name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"moe\.refined\.steps.*moe=plain"),
        (["moe=plain", "retrain.stages.retrain.train.experts=full"], r"experts=full.*lora"),
        (["moe=plain", "trainer=fsdp2", "retrain.stages.retrain.train.experts=lora"], r"trainer=fsdp2.*trainer=ddp"),
    ],
)
def test_what_indexed_storage_cannot_do_is_refused(workplace: Workplace, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=rf"^retrain\.storage=indexed: .*{message}"):
        workplace.compose("retrain.storage=indexed", *overrides)
