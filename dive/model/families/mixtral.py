"""Llama and Mistral become Mixtral."""

from typing import TYPE_CHECKING

from dive.model.families.twin import Form, Twin

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class Mixtral(Twin):
    """Its checkpoints keep the names of Mistral's first release."""

    name = "mixtral"
    dense = ("llama", "mistral")
    plain = True
    in_gguf = {"llama": True}  # noqa: RUF012  Mistral's files say so too
    block_on_disk = "block_sparse_moe"
    experts_on_disk = ("w1", "w3", "w2")

    def config(
        self, dense: "PretrainedConfig", *, width: int, experts: int, top_k: int, shared: int, form: Form
    ) -> "PretrainedConfig":
        """Experts are counted as local ones, and the width of an expert is that of an FFN."""
        from transformers import MixtralConfig

        return MixtralConfig(**self.settings(dense, top_k=top_k), num_local_experts=experts, intermediate_size=width)

    def model_class(self) -> type["PreTrainedModel"]:
        """MixtralForCausalLM."""
        from transformers import MixtralForCausalLM

        stock: type[PreTrainedModel] = MixtralForCausalLM
        return stock
