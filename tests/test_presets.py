"""Every preset in conf/ composes into a valid configuration; the paper's presets hold the paper's figures."""

import json
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from dive.cli import CONF, register_schema, to_typed
from dive.config import (
    Compensation,
    Config,
    CorpusSource,
    Dtype,
    EvaluateConfig,
    Freezing,
    Gate,
    Grouping,
    Measure,
    Metric,
    Mode,
    RefinedConfig,
    RouterInit,
    Schedule,
    StageConfig,
    TextSource,
)
from dive.errors import UserError
from dive.model.architecture import locate_architecture
from dive.plan.stages import plan
from tests.conftest import Build

DOMAINS = [
    "wikitext2",
    "c4",
    "mnli",
    "qnli",
    "rte",
    "anli",
    "squad2",
    "boolq",
    "piqa",
    "drop",
    "coqa",
    "logiqa",
    "record",
    "gsm8k",
    "mathqa",
    "sciq",
    "qasper",
    "pubmedqa",
    "race",
    "winogrande",
    "hellaswag",
    "qqp",
    "mrpc",
    "sst2",
]

# What an option cannot know by itself.
NEEDED = {
    "pruning=flap": ["moe=plain"],
    "pruning=llm_pruner": ["moe=plain"],
    "pruning=wanda_sp": ["moe=plain"],
    "model=local": ["model.path=embedded"],
    "calibration_domains=local": ["calibration_domains.path=/data/text"],
    "affinity=given": ["affinity.groups=[[gsm8k,mathqa],[c4,race]]", "moe.experts=2"],
}
OTHER_SCHEMAS = {"config", "evaluate", "generate", "push", "quantise", "verify", "dashboard"}


def options() -> list[str]:
    """All ``group=option`` pairs in conf/: ``affinity=published/llama2_50``."""
    found = []
    for path in sorted(CONF.rglob("*.yaml")):
        group, *rest = path.relative_to(CONF).with_suffix("").parts
        if rest:
            found.append(f"{group}={'/'.join(rest)}")
        else:
            assert group in OTHER_SCHEMAS, f"{path} belongs to no group"
    return found


@pytest.fixture(autouse=True)
def hydra_in_conf() -> Iterator[None]:
    GlobalHydra.instance().clear()
    register_schema("config", Config)
    with initialize_config_dir(version_base=None, config_dir=str(CONF)):
        yield


def typed(*overrides: str) -> Config:
    found = ["model.path=embedded" if override == "model.path=DIR" else override for override in overrides]
    return to_typed(compose("config", overrides=found), Config)


def experiments() -> list[str]:
    return [option for option in options() if option.startswith("experiment=")]


def swept(experiment: str) -> dict[str, list[str]]:
    """{override: values} that a preset runs one after another; none if it is one run."""
    hydra = compose("config", [experiment], return_hydra_config=True).hydra
    params = hydra.sweeper.params or {}
    assert (hydra.mode is not None and hydra.mode.name == "MULTIRUN") is bool(params)
    return {key: str(values).split(",") for key, values in params.items()}


PAPER = ["experiment=paper_1_8", "experiment=paper_2_8"]
ANALYSES = [f"experiment={name}" for name in ("calibration_size", "grouping", "how_many_experts", "ratio_and_top_k")]


@pytest.mark.parametrize("option", options())
def test_every_option_composes(option: str) -> None:
    choice = f"logger=[{option.removeprefix('logger=')}]" if option.startswith("logger=") else option
    typed(choice, *NEEDED.get(option, []))


def test_the_defaults_compose() -> None:
    typed()


def test_the_best_recipe_is_the_default() -> None:
    assert typed("experiment=dive_plus") == typed()
    assert typed().moe.refined == RefinedConfig()  # which a notebook begins with


def test_the_method_with_our_refit_and_routers_lies_between_the_papers_and_the_default() -> None:
    paper, ours, default = (typed(f"experiment={name}") for name in ("paper_1_8", "dive", "dive_plus"))
    assert (paper.mines, ours.mines, default.mines) == (True, True, False)
    assert (paper.moe.construction, ours.moe.construction, default.moe.construction) == ("plain", "plain", "refined")
    assert ours.pruning == default.pruning
    assert paper.pruning.compensation is Compensation.bias
    assert [moe.plain.router_init for moe in (paper.moe, ours.moe) if moe.plain] == [
        RouterInit.random,
        RouterInit.distilled,
    ]
    assert [*ours.retrain.stages] == ["router", "retrain"] == [*paper.retrain.stages][:2]
    assert ours.retrain.stages["retrain"].train == paper.retrain.stages["retrain"].train


def test_groups_are_not_named_in_vain() -> None:
    with pytest.raises(UserError, match=r"affinity\.groups .*; set affinity=given"):
        typed("affinity.groups=[[law],[code]]", "moe.experts=2")


@pytest.mark.parametrize("option", NEEDED)
def test_what_an_option_cannot_know_is_asked_for(option: str) -> None:
    key = NEEDED[option][0].split("=")[0]
    with pytest.raises(UserError, match=re.escape(key)):
        typed(option)


# -------------------------------------------------------------------------------------------------- the paper


def stage_facts(stage: StageConfig) -> dict[str, object]:
    trained = {
        part: getattr(stage.train, part).value
        for part in ("router", "experts", "norms", "attention", "embeddings", "head")
        if getattr(stage.train, part) is not Freezing.frozen
    }
    return {
        "mode": stage.mode,
        "trained": trained,
        "learning_rate": stage.learning_rate,
        "schedule": stage.schedule,
        "warmup": stage.warmup,
        "floor": stage.floor,
        "weight_decay": stage.weight_decay,
        "batch": stage.batch,
        "tokens": stage.tokens,
    }


@pytest.mark.parametrize(("top_k", "ratio", "temperature"), [(1, 0.5, 0.05), (2, 0.75, 0.5)])
def test_the_paper_experiments_hold_the_papers_figures(top_k: int, ratio: float, temperature: float) -> None:
    config = typed(f"experiment=paper_{top_k}_8")

    assert config.pruning.metric is Metric.wifv
    assert config.pruning.ratio == ratio
    assert config.pruning.compensation is Compensation.bias
    assert config.affinity.grouping is Grouping.mined
    assert (config.moe.experts, config.moe.top_k) == (8, top_k)
    assert config.moe.construction == "plain"
    assert config.moe.settings.router_init is RouterInit.random
    assert config.retrain.noise == 0.0005
    for stage in config.retrain.stages.values():  # cross-entropy alone, the gate of the stock class
        assert not stage.teacher.wanted
        assert stage.gate is Gate.renormalised
        assert stage.balance == stage.z_loss == 0.0

    assert config.retrain.length == 1024
    lora = config.retrain.lora
    assert (lora.rank, lora.alpha, lora.dropout) == (8, 16.0, 0.1)
    assert config.retrain.corpus.chosen is CorpusSource.hub
    assert config.retrain.corpus.hub.streaming

    assert list(config.retrain.stages) == ["router", "retrain", "further"]
    assert config.retrain.stages["router"].temperature == temperature
    sparse = {"router": "full", "norms": "full", "experts": "lora"}
    assert {name: stage_facts(stage) for name, stage in config.retrain.stages.items()} == {
        "router": {
            "mode": Mode.dense,
            "trained": {"router": "full"},
            "learning_rate": 1e-4,
            "schedule": Schedule.constant,
            "warmup": 0.0,
            "floor": 0.0,
            "weight_decay": 0.0,
            "batch": 256,
            "tokens": 256 * 1905 * 1024,  # 0.5 B
        },
        "retrain": {
            "mode": Mode.sparse,
            "trained": sparse,
            "learning_rate": 1e-4,
            "schedule": Schedule.cosine,
            "warmup": 0.03,
            "floor": 0.1,
            "weight_decay": 0.0,
            "batch": 512,
            "tokens": 512 * 9535 * 1024,  # 5.0 B
        },
        "further": {
            "mode": Mode.sparse,
            "trained": sparse,
            "learning_rate": 1e-5,
            "schedule": Schedule.constant,
            "warmup": 0.0,
            "floor": 0.0,
            "weight_decay": 0.0,
            "batch": 256,
            "tokens": 256 * 38140 * 1024,  # 10 B
        },
    }


@pytest.mark.parametrize("experiment", experiments())
def test_an_experiment_leaves_the_model_the_data_and_the_hardware_alone(experiment: str) -> None:
    plain, chosen = typed(*(["budget=paper"] if experiment in PAPER else [])), typed(experiment)
    assert chosen.model == plain.model
    assert chosen.calibration_domains == plain.calibration_domains
    assert chosen.trainer == plain.trainer


def test_the_command_line_wins_over_an_experiment() -> None:
    config = typed("experiment=paper_1_8", "affinity=published/tinyllama_50", "retrain=none")
    assert config.affinity.grouping is Grouping.published
    assert config.retrain.stages == {}


def commands_in(path: Path) -> list[list[str]]:
    """Overrides of the commands that the comments of a preset recommend."""
    comments = [line[1:] for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(comments).replace("\\\n", " ")
    return [shlex.split(line)[3:] for line in text.splitlines() if line.strip().startswith("python -m dive.train")]


@pytest.mark.parametrize("experiment", PAPER)
def test_the_commands_in_the_papers_comments_compose(experiment: str) -> None:
    commands = commands_in(CONF / f"{experiment.replace('=', '/')}.yaml")
    paper, small = (typed(*overrides) for overrides in commands)

    assert paper.calibration_domains.source is TextSource.hub
    assert sum(stage.tokens for stage in paper.retrain.stages.values()) == pytest.approx(15.5e9, rel=0.01)
    assert small.retrain.corpus.chosen is CorpusSource.domains
    assert sum(stage.tokens for stage in small.retrain.stages.values()) == 131072


# ---------------------------------------------------------------------------------------------------- analyses


@pytest.mark.parametrize("experiment", ANALYSES)
def test_every_run_of_an_analysis_composes(experiment: str) -> None:
    params = swept(experiment)
    combinations = [
        [f"{key}={value}" for key, value in zip(params, values, strict=True)] for values in product(*params.values())
    ]
    runs = [typed(experiment, *overrides) for overrides in combinations]
    assert len(runs) >= 3
    assert all(one != other for one, other in pairwise(runs))


@pytest.mark.parametrize("experiment", ANALYSES)
def test_the_commands_in_an_analysis_compose_and_name_it(experiment: str) -> None:
    commands = commands_in(CONF / f"{experiment.replace('=', '/')}.yaml")
    assert len(commands) == 2
    for overrides in commands:
        assert experiment in overrides
        chosen = [o.partition(",")[0] if o.partition("=")[0] in (*swept(experiment), "seed") else o for o in overrides]
        typed(*chosen)


def test_only_the_analyses_are_sweeps() -> None:
    assert [experiment for experiment in experiments() if swept(experiment)] == ANALYSES


def test_the_active_size_stays_while_top_k_grows() -> None:
    shares = {}
    for top_k in swept("experiment=ratio_and_top_k")["moe.top_k"]:
        config = typed("experiment=ratio_and_top_k", f"moe.top_k={top_k}")
        shares[config.moe.top_k] = config.moe.top_k * config.pruning.width(768)
    assert shares == {1: 192, 2: 192, 4: 192}


def test_naming_groups_means_to_begin_with_them() -> None:
    default = typed()
    assert default.grouping is None
    assert not default.mines
    for option, grouping in {
        "mined": Grouping.mined,
        "random": Grouping.random,
        "importance": Grouping.mined,
        "published/llama2_20": Grouping.published,
    }.items():
        config = typed(f"affinity={option}")
        assert config.grouping is grouping
        assert config.moe == default.moe
    assert typed("moe=plain").mines
    assert not typed("moe=plain", "moe.experts=1").mines
    assert typed("moe=coactivation", "affinity=mined").grouping is None
    with pytest.raises(UserError, match=r"moe\.refined\.start=kmeans .* affinity\.grouping=random names some"):
        typed("affinity=random", "moe.refined.start=kmeans")
    with pytest.raises(UserError, match=r"moe\.refined\.start=random .* affinity\.grouping=mined names some"):
        typed("affinity=importance", "moe.refined.start=random")
    with pytest.raises(UserError, match=r"affinity\.measure=importance: .* set affinity=mined, or moe=plain"):
        typed("affinity.measure=importance")


def test_one_construction_is_chosen() -> None:
    presets = {"default": "refined"} | {name: name for name in ("plain", "random_split", "coactivation", "upcycle")}
    assert {name: typed(f"moe={name}").moe.construction for name in presets} == presets
    with pytest.raises(UserError, match=r"moe\.refined and moe\.plain are both set"):
        typed("+moe={plain:{}}")
    with pytest.raises(UserError, match="no way to build experts; set moe=default"):
        typed("moe.refined=null")


def test_groups_by_importance_are_mined_from_statistics() -> None:
    affinity = typed("affinity=importance").affinity
    assert (affinity.grouping, affinity.measure) == (Grouping.mined, Measure.importance)


# ---------------------------------------------------------------------------------------------------- baselines


def test_the_published_baselines() -> None:
    presets = {name: typed(f"pruning={name}", "moe=plain").pruning for name in ("flap", "wanda_sp", "llm_pruner")}
    assert {name: (p.metric, p.compensation) for name, p in presets.items()} == {
        "flap": (Metric.wifv, Compensation.bias),
        "wanda_sp": (Metric.wifn, Compensation.none),
        "llm_pruner": (Metric.taylor, Compensation.none),
    }
    split = typed("moe=coactivation").moe.coactivation
    assert split is not None
    assert (split.shared, split.active_channels) == (0.25, 10)


def test_the_paper_domains() -> None:
    config = typed("budget=paper", "calibration_domains=paper").calibration_domains
    assert list(config.hub) == DOMAINS
    assert (config.samples, config.group_samples, config.length) == (1024, 1024, 256)
    assert all(source.test is not None for source in config.hub.values())


PUBLISHED = [option for option in options() if option.startswith("affinity=published/")]


def test_all_published_groupings_are_there() -> None:
    assert [option.rpartition("/")[2] for option in PUBLISHED] == [
        "llama2_20",
        "llama2_50",
        "llama2_75",
        "tinyllama_50",
        "tinyllama_75",
    ]


@pytest.mark.parametrize("option", PUBLISHED)
def test_published_groups_hold_each_domain_once(option: str) -> None:
    affinity = typed(option).affinity
    assert affinity.grouping is Grouping.published
    assert affinity.groups is not None
    assert len(affinity.groups) == 8
    assert sorted(domain for group in affinity.groups for domain in group) == sorted(DOMAINS)


def test_the_paper_evaluation() -> None:
    config = typed("eval=paper").eval
    assert config.windows is None
    assert config.lengths == [1024, 2048]
    assert {name: entry.lengths for name, entry in config.sets.items()} == {
        "wikitext2_raw": [1024, 2048],
        "lambada": [1024, 2048],
    }
    assert config.sets["wikitext2_raw"].separator == "\n\n"
    assert all(entry.hub is not None and entry.hub.test == "test" for entry in config.sets.values())


def test_the_papers_tasks_and_their_examples() -> None:
    config = typed("eval=paper").eval
    shots = {name: config.task_settings[name].shots for name in config.tasks}
    assert shots == {
        "sciq": 0,
        "piqa": 0,
        "winogrande": 0,
        "arc_easy": 0,
        "arc_challenge": 25,
        "mathqa": 0,
        "hellaswag": 10,
        "logiqa_parquet": 0,
        "boolq": 0,
        "openbookqa": 0,
        "mmlu": 5,
    }
    some = typed("eval=paper", "eval.tasks=[sciq,mmlu]", "eval.task_settings.mmlu.limit=9").eval
    assert some.tasks == ["sciq", "mmlu"]
    assert (some.task_settings["mmlu"].shots, some.task_settings["mmlu"].limit) == (5, 9)
    mine = typed("eval.tasks=[mine]", "+eval.task_settings={mine:{shots:2}}").eval
    assert mine.task_settings["mine"].shots == 2


@pytest.mark.slow  # reads the index of 14 000 tasks
def test_the_papers_tasks_are_known() -> None:
    lm_eval = pytest.importorskip("lm_eval.tasks", reason="lm-evaluation-harness is an optional extra")
    from dive.eval.tasks import OWN_TASKS

    config = typed("eval=paper").eval
    index = lm_eval.TaskManager(include_path=OWN_TASKS).task_index
    assert set(config.tasks) <= set(index)
    assert set(config.tasks) == set(config.task_settings)


@pytest.mark.parametrize("option", [o for o in options() if o.startswith(("eval=", "calibration_domains="))])
def test_dive_evaluate_takes_the_same_options(option: str) -> None:
    register_schema("evaluate", EvaluateConfig)
    config = to_typed(compose("evaluate", ["checkpoint=DIR", option, *NEEDED.get(option, [])]), EvaluateConfig)
    assert config.checkpoint == "DIR"
    with pytest.raises(UserError, match="checkpoint is needed"):
        to_typed(compose("evaluate", [option, *NEEDED.get(option, [])]), EvaluateConfig)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.tasks=[a,a]", r"eval\.tasks names \['a'\] twice"),
        ("eval.task_limit=0", r"eval\.task_limit \(0\) must be at least 1 and at most 1e9, or null"),
        (
            "+eval.task_settings={a:{shots:-1}}",
            r"eval\.task_settings\.a\.shots \(-1\) must be at least 0 and at most 1000, or null",
        ),
        (
            "+eval.task_settings={a:{limit:0}}",
            r"eval\.task_settings\.a\.limit \(0\) must be at least 1 and at most 1e9, or null",
        ),
        ("eval.ngram=-1", r"eval\.ngram \(-1\) must be at least 0 and at most 1000"),
    ],
)
def test_settings_of_tasks_that_make_no_sense(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        typed(override)


# ----------------------------------------------------------------------------------------------- models and budgets

MODELS = [option for option in options() if option.startswith("model=")]
REAL = [option for option in MODELS if option != "model=tiny"]
BUDGETS = [option for option in options() if option.startswith("budget=")]


def of_model(option: str, *overrides: str) -> Config:
    return typed(option, *NEEDED.get(option, []), *overrides)


@pytest.mark.parametrize("option", MODELS)
def test_every_budget_goes_with_every_model(option: str) -> None:
    times = {}
    for budget in BUDGETS:
        config = of_model(option, budget)
        times[budget] = plan(config, locate_architecture(config.model), device="h100").seconds
        assert option == f"model={config.model.name}"
        assert budget == f"budget={config.budget.name}"
        if option in REAL and budget != "budget=toy":
            assert config.calibration_domains.source is TextSource.hub
            assert min(config.retrain.length, *config.eval.lengths) >= 1024
            assert config.retrain.corpus.chosen is CorpusSource.hub
            assert config.retrain.corpus.hub.path == "HuggingFaceFW/fineweb-edu"
    assert times["budget=minutes"] < times["budget=hours"] < times["budget=paper"]


@pytest.mark.parametrize("option", REAL)
def test_a_real_model_composes_a_real_run(option: str) -> None:
    config = of_model(option)
    assert config.budget.name == "hours"
    assert config.retrain.length == 2048
    assert config.retrain.corpus.hub.streaming
    assert 39e6 < sum(stage.tokens for stage in config.retrain.stages.values()) < 41e6
    assert config.eval.lengths == [2048]
    assert {name: entry.lengths for name, entry in config.eval.sets.items()} == {
        "wikitext2_raw": [2048],
        "lambada": [2048],
    }
    assert config.eval.tasks == ["piqa", "arc_easy", "hellaswag", "winogrande", "sciq"]
    assert config.model.dtype is None


def test_the_embedded_model_composes_a_toys_run() -> None:
    config = typed()
    assert config.budget.name == "toy"
    assert config.calibration_domains.source is TextSource.embedded
    assert (config.calibration_domains.samples, config.retrain.length, config.eval.lengths) == (32, 256, [256])
    assert config.retrain.corpus.chosen is CorpusSource.domains
    assert (config.eval.tasks, config.eval.windows) == ([], 12)
    stage = config.retrain.stages["retrain"]
    assert (stage.tokens, stage.batch, stage.learning_rate) == (131072, 8, 1.5e-3)
    assert (config.trainer.accelerator, config.trainer.precision, config.model.dtype) == (
        "cpu",
        "32-true",
        Dtype.float32,
    )


def test_a_budget_makes_no_stage_and_an_override_goes_before_it() -> None:
    assert typed("model=llama2-7b", "budget=paper", "retrain=none").retrain.stages == {}
    own = typed("model=llama2-7b", "retrain=none", "+retrain.stages={mine:{tokens:4096,batch:2,train:{norms:full}}}")
    assert list(own.retrain.stages) == ["mine"]
    more = typed("model=tinyllama", "budget=minutes", "retrain.stages.retrain.tokens=1000000", "eval.windows=7")
    assert (more.retrain.stages["retrain"].tokens, more.retrain.stages["retrain"].batch) == (1000000, 2)
    assert (more.eval.windows, more.eval.task_limit) == (7, 20)
    assert typed("budget.tokens=4096").retrain.stages["retrain"].tokens == 4096
    for budget in ("minutes", "hours", "paper"):
        config = typed("model=tinyllama", f"budget={budget}", "retrain=two_stages")
        assert sum(stage.tokens for stage in config.retrain.stages.values()) == config.budget.tokens


def test_the_corpus_is_the_one_that_is_named() -> None:
    own = ("calibration_domains=local", "calibration_domains.path=DIR")
    assert typed("model=llama2-7b", "retrain.corpus.path=FILE").retrain.corpus.chosen is CorpusSource.local
    assert typed("model=llama2-7b", "retrain.corpus.source=domains").retrain.corpus.chosen is CorpusSource.domains
    assert typed("model=llama2-7b", *own).retrain.corpus.chosen is CorpusSource.domains
    paper = typed("model=llama2-7b", "experiment=paper_1_8").retrain.corpus.hub
    assert (paper.path, paper.config) == ("gmongaras/SlimPajama-627B_Reupload", None)


def test_size_decides_how_experts_are_trained_unless_something_else_is_asked_for(build: Build, tmp_path: Path) -> None:
    def chosen(*overrides: str) -> tuple[str, Freezing, float]:
        config = typed(*overrides)
        stage = config.retrain.stages["retrain"]
        return config.trainer.accelerator, stage.train.experts, stage.learning_rate

    assert chosen() == ("cpu", Freezing.full, 1.5e-3)
    assert chosen("model=smollm2-135m") == ("auto", Freezing.full, 5e-4)
    assert chosen("model=tinyllama") == ("auto", Freezing.full, 2e-4)
    assert chosen("model=llama2-7b", "moe.experts=8") == ("gpu", Freezing.lora, 2e-4)
    assert chosen("model=llama2-7b", "experiment=dive_plus") == ("gpu", Freezing.lora, 2e-4)
    assert chosen("model=llama2-7b", "retrain=full", "trainer=cpu") == ("cpu", Freezing.full, 2e-4)
    assert chosen("model=tinyllama", "retrain=lora") == ("auto", Freezing.lora, 2e-4)
    assert typed("model=llama2-7b", "trainer=ddp").trainer.devices == 8
    assert typed("model=llama2-7b", "experiment=paper_1_8").retrain == typed("experiment=paper_1_8").retrain

    build("llama").config.save_pretrained(tmp_path)
    local = ("model=local", f"model.path={tmp_path}")
    assert chosen(*local) == ("auto", Freezing.full, 1.5e-3)
    settings = json.loads((tmp_path / "config.json").read_text())
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    (tmp_path / "config.json").write_text(json.dumps(settings | large))
    assert chosen(*local) == ("auto", Freezing.lora, 2e-4)


def test_the_device_decides_what_is_left_to_it() -> None:
    config = typed("model=smollm2-135m")
    for gpu, found in ((True, ("gpu", "bf16-mixed", Dtype.bfloat16)), (False, ("cpu", "32-true", Dtype.float32))):
        settled = config.settled(gpu=gpu)
        assert (settled.trainer.accelerator, settled.trainer.precision, settled.model.dtype) == found
        assert settled.settled(gpu=not gpu) == settled
    on_cpu = typed("model=llama2-7b", "trainer=cpu").settled(gpu=True)
    assert (on_cpu.trainer.accelerator, on_cpu.model.dtype) == ("cpu", Dtype.float32)
    assert typed("model=tinyllama", "trainer=fsdp").settled(gpu=True).model.dtype is Dtype.float32  # it shards one type
    for full in (
        "trainer.precision=32-true",
        "model.device=cpu",
    ):  # the other half would train, or compute here, in bfloat16
        assert typed("model=smollm2-135m", "trainer=gpu", full).settled(gpu=True).model.dtype is Dtype.float32


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        ((), 1),  # 8 × 256
        (("model=llama2-7b",), 32),  # 64 × 2048: two sequences a pass
        (("model=llama2-7b", "trainer.devices=8", "trainer=ddp"), 4),
        (("model=llama2-7b", "trainer.pass_tokens=100"), 64),  # never less than a sequence
        (("model=llama2-7b", "trainer.accumulation=8"), 8),
        (("model=llama2-7b", "trainer.accumulation=8", "retrain.stages.retrain.accumulation=16"), 16),
        (("model=llama2-7b", "retrain.stages.retrain.batch=3"), 3),  # two do not divide it
    ],
)
def test_a_step_is_cut_into_passes_that_fit(overrides: tuple[str, ...], passes: int) -> None:
    config = typed(*overrides)
    assert config.accumulation(config.retrain.stages["retrain"]) == passes
