"""Llama and Mistral become Mixtral."""

from typing import TYPE_CHECKING

from dive.model.families.twin import Form, Twin, Unserved

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

    def unserved(self, form: Form, dense: "PretrainedConfig", *, experts: int) -> list[Unserved]:
        """Two more, of SGLang's class, which takes heads and positions to be those of Mistral's first release."""
        found = super().unserved(form, dense, experts=experts)
        if (getattr(dense, "rope_parameters", None) or {}).get("rope_type", "default") != "default":
            said = "leaves RoPE scaling out of this class: it gives other answers (not of `model.twin=qwen2_moe`)."
            found.append(Unserved(("SGLang",), f"SGLang 0.5.23 {said}"))
        if getattr(dense, "head_dim", None) not in (None, dense.hidden_size // dense.num_attention_heads):
            said = "SGLang 0.5.23 takes a head of this class to be hidden size / heads wide: it gives other answers."
            found.append(Unserved(("SGLang",), said))
        return found

    def model_class(self) -> type["PreTrainedModel"]:
        """MixtralForCausalLM."""
        from transformers import MixtralForCausalLM

        stock: type[PreTrainedModel] = MixtralForCausalLM
        return stock
