"""Qwen2 becomes Qwen2-MoE, and Llama and Mistral do where it is asked for."""

from typing import TYPE_CHECKING

from dive.config import ArchitectureConfig, Gates
from dive.errors import UserError
from dive.model.families.twin import Form, Twin, Unserved

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

NOTHING_SHARED = 8
"""Channels of a shared expert that adds nothing. Engines differ in what they make of one without channels: llama.cpp takes the
width of a dense FFN instead. Eight numbers of bfloat16 are the 16 bytes that grouped matrix products need."""
HALF = 2.0**-24
"""Every weight of the shared expert's gate, so that its sigmoid is a half to within rounding. Not 0: llama.cpp computes the
sigmoid of x as silu(x) / x, which is no number there. It is the smallest number that float16 has."""
SHARED = tuple(f"shared_expert.{name}" for name in Twin.projections)
"""The shared expert's linear maps in a sparse block."""


class Qwen2Moe(Twin):
    """Queries, keys and values have biases, and a shared expert stands beside the others."""

    name = "qwen2_moe"
    dense = ("llama", "mistral", "qwen2")
    llama_cpp_gates = Gates.probabilities
    shared = True
    qkv_bias = True
    biased = ("qwen2",)
    in_gguf = {}  # noqa: RUF012

    def config(
        self, dense: "PretrainedConfig", *, width: int, experts: int, top_k: int, shared: int, form: Form
    ) -> "PretrainedConfig":
        """Biases are there whether the dense model has them or not: vLLM always makes them."""
        from transformers import Qwen2MoeConfig

        return Qwen2MoeConfig(
            **self.settings(dense, top_k=top_k),
            num_experts=experts,
            moe_intermediate_size=width,
            shared_expert_intermediate_size=shared or NOTHING_SHARED,
            intermediate_size=dense.intermediate_size,
            norm_topk_prob=form.gates is Gates.renormalised,
            decoder_sparse_step=1,
            mlp_only_layers=list(form.dense_layers),
            qkv_bias=True,
            use_sliding_window=False,
        )

    def model_class(self) -> type["PreTrainedModel"]:
        """Qwen2MoeForCausalLM."""
        from transformers import Qwen2MoeForCausalLM

        stock: type[PreTrainedModel] = Qwen2MoeForCausalLM
        return stock

    def check(self, config: "PretrainedConfig", path: str) -> None:
        """Refuse sliding windows as well: its engines know none.

        Raises:
            UserError: it has biases elsewhere, or sliding windows.
        """
        super().check(config, path)
        windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        if windows or (config.model_type == "mistral" and config.sliding_window is not None):
            another = "" if config.model_type in self.biased else "set model.twin=auto, or "  # which is this one itself
            raise UserError(
                f"model.path={path}: engines give a {self.name} no sliding window; {another}choose another model"
            )

    def unserved(self, form: Form, dense: "PretrainedConfig", *, experts: int) -> list[Unserved]:
        """Two more: its converter and its engines take heads and positions to be Qwen2's."""
        found = super().unserved(form, dense, experts=experts)
        if (getattr(dense, "rope_parameters", None) or {}).get("rope_type") == "llama3":
            said = "llama.cpp's converter leaves Llama 3's RoPE scaling out of this class: it gives other answers."
            found.append(Unserved(("llama.cpp",), said))
        if getattr(dense, "head_dim", None) not in (None, dense.hidden_size // dense.num_attention_heads):
            said = "vLLM and SGLang take a head of this class to be hidden size / heads wide: they give other answers. "
            found.append(Unserved(("vLLM", "SGLang", "llama.cpp"), f"{said}llama.cpp refuses wider ones."))
        return found

    def beside_experts(self, config: "PretrainedConfig", shared: "tuple[Tensor, Tensor] | None") -> dict[str, "Tensor"]:
        """The shared expert, of zeros where there is none, its output doubled; and its gate, which halves it."""
        import torch

        hidden, width = config.hidden_size, config.shared_expert_intermediate_size
        gate_up, down = shared or (torch.zeros(2 * width, hidden), torch.zeros(hidden, width))
        gate, up = gate_up.chunk(2)
        tensors = (gate, up, 2 * down)
        named = {f"{name}.weight": tensor for name, tensor in zip(SHARED, tensors, strict=True)}
        return named | {"shared_expert_gate.weight": torch.full((1, hidden), HALF)}

    def weights_beside_experts(self, architecture: ArchitectureConfig, *, shared: int) -> int:
        """The shared expert's and its gate's."""
        return architecture.hidden_size * (3 * (shared or NOTHING_SHARED) + 1)

    def shared_projections(self, config: "PretrainedConfig") -> tuple[str, ...]:
        """Gate, up and down."""
        return SHARED if config.shared_expert_intermediate_size > NOTHING_SHARED else ()
