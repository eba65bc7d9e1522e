"""Qwen3 becomes Qwen3-MoE."""

from typing import TYPE_CHECKING, Any

from dive.config import ArchitectureConfig, Gates
from dive.model.families.twin import Form, Twin

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class Qwen3Moe(Twin):
    """Query and key heads have norms."""

    name = "qwen3_moe"
    dense = ("qwen3",)
    llama_cpp_gates = Gates.renormalised
    in_gguf = {"qwen3": False}  # noqa: RUF012
    head_dim = 128

    def config(
        self, dense: "PretrainedConfig", *, width: int, experts: int, top_k: int, shared: int, form: Form
    ) -> "PretrainedConfig":
        """Layers that stay dense keep their FFN's width."""
        from transformers import Qwen3MoeConfig

        return Qwen3MoeConfig(
            **self.settings(dense, top_k=top_k),
            num_experts=experts,
            moe_intermediate_size=width,
            intermediate_size=dense.intermediate_size,
            norm_topk_prob=form.gates is Gates.renormalised,
            decoder_sparse_step=1,
            mlp_only_layers=list(form.dense_layers),
            use_sliding_window="sliding_attention" in dense.layer_types,
        )

    def model_class(self) -> type["PreTrainedModel"]:
        """Qwen3MoeForCausalLM."""
        from transformers import Qwen3MoeForCausalLM

        stock: type[PreTrainedModel] = Qwen3MoeForCausalLM
        return stock

    def head_norms(self, architecture: ArchitectureConfig) -> int:
        """One of a head's width for queries, one for keys."""
        return 2 * architecture.head_dim

    def earlier_names(self, config: dict[str, Any]) -> dict[str, Any]:
        """Without ``num_experts`` releases before transformers 5 take 128 of them, in silence."""
        return {"num_experts": config["num_local_experts"]}
