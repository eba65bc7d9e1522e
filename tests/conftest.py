"""Tiny dense models and a tiny tokenizer, made here: the tests need no network and no files of anyone's."""

import copy
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.workplace import Workplace, write_domains

torch.set_num_threads(1)

Build: TypeAlias = Callable[..., PreTrainedModel]

VOCABULARY = 320
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large, so that a wrong FFN shows in the logits
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"rms_norm_eps": 1e-5}),
    "llama-tied": (
        LlamaConfig,
        LlamaForCausalLM,
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE, "head_dim": 16},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 5, "head_dim": 8}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "bos_token_id": None}),
    "qwen3-tied": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8, "tie_word_embeddings": True}),
}
"""Every family; grouped-query attention in all, tied and untied embeddings, heads wider than D / heads."""


@pytest.fixture(scope="session")
def build() -> Build:
    """``build("llama", hidden_size=64, seed=1)``: a frozen tiny dense model in evaluation mode."""

    def make(variant: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        config_class, model_class, settings = VARIANTS[variant]
        generator_state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        model = model_class(config_class(**{**SHAPE, **settings, **overrides}))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        torch.random.set_rng_state(generator_state)
        model.requires_grad_(False)
        return model.eval()

    return make


@pytest.fixture(params=VARIANTS)
def dense(request: pytest.FixtureRequest, build: Build) -> PreTrainedModel:
    """A tiny dense model of each variant in turn."""
    return build(request.param)


@pytest.fixture(scope="session")
def tokens() -> Callable[..., torch.Tensor]:
    """``tokens(samples, length, seed=0)``: random token ids, int64."""

    def draw(samples: int, length: int, *, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(VOCABULARY, (samples, length), generator=generator)

    return draw


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on three sentences, with BOS 0 and EOS 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the cat sat on the mat", "12 + 30 = 42", "import torch; print(torch)"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}{{ raise_exception('unknown role') }}{% endif %}"
    "{{ message.role + ': ' + message.content + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same with a chat template: BOS, then ``<role>: <content>`` and EOS for each message."""
    found = copy.deepcopy(tokenizer)
    found.chat_template = CHAT_TEMPLATE
    return found


@pytest.fixture(scope="session")
def workplace(build: Build, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Whole experiments on a tiny Llama with tied embeddings, all in one store."""
    root = tmp_path_factory.mktemp("workplace")
    build("llama-tied").save_pretrained(root / "dense")
    tokenizer.save_pretrained(root / "dense")
    return Workplace(root, root / "dense", write_domains(root / "domains"))


@pytest.fixture
def untrained(workplace: Workplace) -> Workplace:
    """The same place, without its settings of retraining."""
    place = copy.copy(workplace)
    place.settings = [setting for setting in workplace.settings if not setting.startswith("retrain")]
    return place
