"""What every twin must do, from the dense model on disk to the exported Mixture-of-Experts."""

from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dive.cli import composed
from dive.config import PARTS, ModelConfig
from dive.export import save, save_streamed
from dive.model.architecture import locate_architecture
from dive.model.families import (
    UNTRAINED,
    count_parameters,
    decoder_layers,
    empty_moe,
    ffn,
    ffn_modules,
    form_of,
    moe_class,
    moe_config,
    part_of,
)
from dive.model.load import load_weights, locate_dense
from dive.model.streamed import load_streamed
from dive.moe.assemble import assemble
from dive.moe.layer import ExpertLayer
from dive.plan.parameters import full_sizes, shapes

CPU = torch.device("cpu")


def check_twin(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path, overrides: tuple[str, ...] = ()
) -> PreTrainedModel:
    """Loading, streaming, both exports and the plan's arithmetic; gives the twin, whose experts are whole FFNs.

    Args:
        overrides: what is chosen of the twin.
    """
    dense.save_pretrained(directory / "dense")
    tokenizer.save_pretrained(directory / "dense")
    source = locate_dense(str(directory / "dense"))
    here = (f"model.path={directory / 'dense'}", "model=local")
    config = composed([*here, "moe.experts=3", "pruning.ratio=0.5", *overrides])
    form = form_of(config, dense.config.model_type)
    layers = [
        whole_experts(dense, number) for number in range(len(decoder_layers(dense))) if number not in form.dense_layers
    ]
    ids = torch.arange(2 * 16).reshape(2, 16) * 7 % dense.config.vocab_size
    with torch.no_grad():
        expected = dense(input_ids=ids).logits
        assert expected.std() > 0.1  # or nothing below would notice a wrong FFN

        moe = assemble(load_weights(source, dtype=torch.float32, device=CPU), layers, top_k=2, form=form)
        assert type(moe) is moe_class(moe.config)
        torch.testing.assert_close(moe(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        save(moe, tokenizer, directory / "assembled")

        streamed = load_streamed(source, dtype=torch.float32, device=CPU)
        torch.testing.assert_close(streamed(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
        save_streamed(streamed, layers, tokenizer, directory / "streamed", top_k=2, form=form)
        again, report = AutoModelForCausalLM.from_pretrained(directory / "streamed", output_loading_info=True)
        assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)

    one, other = tensors(directory / "assembled"), tensors(directory / "streamed")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    s = shapes(locate_architecture(ModelConfig(name="here", path=str(directory / "dense"))), config)
    assert s.dense == sum(parameter.numel() for parameter in dense.parameters())
    with torch.device("meta"):
        stock = empty_moe(moe_config(dense.config, width=s.width, experts=3, top_k=1, form=form), torch.float32)
    assert (s.total, s.active) == count_parameters(stock.config)
    sizes = Counter(dict.fromkeys(PARTS, 0))
    for name, parameter in stock.named_parameters():
        sizes[part_of(stock, name)] += parameter.numel()
    untrained = sizes.pop(UNTRAINED, 0)
    assert full_sizes(s) == sizes
    assert s.total == sizes.total() + untrained
    return moe


def whole_experts(dense: PreTrainedModel, number: int) -> ExpertLayer:
    """Three experts that are the dense FFN with its channels in another order: whichever are chosen, they compute the same."""
    weights = ffn(dense, number)
    module, down = ffn_modules(dense, number)
    width, hidden = weights.gate.shape
    generator = torch.Generator().manual_seed(number)
    rows = torch.randn(4, hidden, generator=generator)
    with torch.no_grad():  # the weights and the modules are of one and the same FFN
        torch.testing.assert_close(down(weights.channels(rows)), module(rows))
    orders = [torch.randperm(width, generator=generator) for _ in range(3)]
    return ExpertLayer(
        masks=torch.ones(3, width, dtype=torch.bool),
        gate_up=torch.stack([torch.cat([weights.gate[order], weights.up[order]]) for order in orders]),
        down=torch.stack([weights.down[:, order] for order in orders]),
        router=torch.randn(3, hidden, generator=generator),
    )


def tensors(directory: Path) -> dict[str, Tensor]:
    """All of a checkpoint's, from however many shards."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
