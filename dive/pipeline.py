"""The method, in order: dense model in, Mixture-of-Experts out. Data flows one way, and every result rests in the store."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from dive.affinity.groups import choose_groups
from dive.config import Config, EvaluateConfig
from dive.export import open_checkpoint
from dive.inputs import beginnings, check, check_evaluation, prepare, prepare_evaluation, tokens_of
from dive.model.families import form_of
from dive.model.load import resolve_device
from dive.model.recipe import Dense
from dive.moe.build import ONE_EXPERT, build_experts
from dive.moe.mixture import Mixture
from dive.results import CHECKPOINT, DENSE, DEQUANTISED, PRUNED, RECONSTRUCTED, Results
from dive.retrain.retrained import Retrained
from dive.retrain.stage import retrain
from dive.run import Run
from dive.trainer.build import check_devices
from dive.trainer.processes import connect


def train(config: Config, directory: Path, overrides: Sequence[str]) -> Results:
    """The whole method.

    Args:
        directory: of this run's outputs.
        overrides: of the command line, for the record.

    Returns:
        What ``results.json`` holds.

    Raises:
        UserError: something that the user can mend.
    """
    config = config.settled(gpu=torch.cuda.is_available())
    check_devices(config.trainer)
    dense = Dense.locate(config.model)
    check(config, dense.source)
    run = Run(config, ["python", "-m", "dive.train", *overrides], directory)
    run.plan(config, dense)
    connect(config.trainer)
    with run.stage(DEQUANTISED):
        dense = dense.in_safetensors(run)
    data = prepare(run, config, dense)
    run.open(data, dense)
    run.measure(DENSE, dense, data)

    groups = choose_groups(run, config, dense, data.tokens, data.measured)
    run.grouped(groups, config)
    limit = config.calibration_domains.group_samples
    tokens = partial(tokens_of, data.tokens, generated=data.generated, group_samples=limit)
    build = partial(build_experts, run, config.calibration_domains.batch, model=dense, seed=config.seed)
    pruning = config.pruning.effective()
    moe, form = config.moe.effective(pruning), form_of(config, dense.source.config.model_type)
    if run.evaluates:
        with run.stage(PRUNED):
            single = replace(ONE_EXPERT, dense_layers=moe.dense_layers)
            one = build(tokens=tokens(groups.together(), experts=1), pruning=pruning, moe=single)
        run.measure(PRUNED, Mixture(dense, one, top_k=1, form=form.of_one_expert()), data)
    with run.stage(RECONSTRUCTED):
        text = tokens(groups.members, experts=moe.experts)
        experts = build(tokens=text, pruning=pruning, moe=moe)
    model: Mixture | Retrained = Mixture(dense, experts, config.moe.top_k, config.retrain.storage, form)
    run.measure(RECONSTRUCTED, model, data)

    for name, stage in config.retrain.stages.items():
        with run.stage(name):
            model = retrain(run, config, name=name, model=model, corpus=data.corpora[stage.text])
        run.measure(name, model, data)

    run.finish(config, model, data.tokenizer, beginnings(config.eval, data.texts, groups))
    return run.results


def evaluate(config: EvaluateConfig, directory: Path, overrides: Sequence[str]) -> Results:
    """Perplexity and tasks of one finished model, whoever made it.

    Args:
        directory: of this run's outputs.
        overrides: of the command line, for the record.

    Returns:
        What ``results.json`` holds: the same as a run's, with one stage.

    Raises:
        UserError: something that the user can mend.
    """
    device = resolve_device(config.device, "device")
    model = open_checkpoint(config.checkpoint, revision=config.revision, dtype=config.dtype.value, device=device)
    check_evaluation(config, model.source)
    run = Run(config, ["python", "-m", "dive.evaluate", *overrides], directory)
    model = model.in_safetensors(run)
    data = prepare_evaluation(run, config, model.source)
    run.open(data, model)
    run.measure(CHECKPOINT, model, data)
    run.finish_evaluation(model)
    return run.results
