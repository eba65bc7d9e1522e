"""The router used in training: dense with a temperature, or top-k; with learned noise.

Shapes: T tokens, D hidden width, E experts, K experts a token.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dive.config import Gate, Mode
from dive.moe.balance import expert_load, overload, z_loss

COLDEST = 0.05
"""Temperature at which ``Gate.annealed`` ends."""


class Router(nn.Module):
    """Takes the place of a stock router and gives its weight back.

    In ``sparse`` mode it computes what the stock router does: softmax over all experts, the K largest, renormalised if the
    stock router does that. In ``dense`` mode every expert runs and the gate is softmax(logits / temperature). In training,
    and with ``noise`` > 0, logits += randn · softplus(noise weight · x) · noise, as in the paper.

    Training in sparse mode may weight the selected experts otherwise, see :class:`dive.config.Gate`: the renormalised gate
    of a single expert is 1 and its gradient exactly 0. Evaluation always is what the stock router does.
    """

    load: Tensor
    entropy: Tensor
    tokens: Tensor

    def __init__(self, stock: Any, *, experts: int, top_k: int, renormalise: bool = True, noise: float = 0.0) -> None:
        super().__init__()
        self.weight: nn.Parameter = stock.weight
        self.noise_weight = nn.Parameter(torch.zeros_like(self.weight)) if noise > 0 else None
        self.noise = noise
        self.experts = experts
        self.top_k = top_k
        self.renormalise = renormalise
        self.mode = Mode.sparse
        self.temperature = 1.0
        self.gate = Gate.renormalised
        self.exponent = 1.0
        """Share of the stage that is left: of the probability in ``Gate.switch``, temperature in ``Gate.annealed``."""
        self.balance, self.max_load, self.z_loss = 0.0, 1.0, 0.0
        self.penalty: Tensor | None = None
        """Of the last recorded forward pass in training; holds the pass's graph until it is taken."""
        self.recording = True
        """Whether a forward pass in training keeps its penalty and counts its load. Whoever trains turns it off before the
        backward pass, in which checkpointed layers run again."""
        self.stock_class = type(stock)
        self.rounds_gates = _rounds_gates(stock)
        for name, shape in (("load", (experts,)), ("entropy", ()), ("tokens", ())):
            self.register_buffer(name, torch.zeros(shape, device=self.weight.device), persistent=False)
        self.train(stock.training)  # a new module is in training mode, whatever it is plugged into

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., D) to logits (T, E), gates (T, K) and experts (T, K); K is E in dense mode."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        # Close calls between experts are lost in bfloat16: mixed precision stays out of the router.
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.to(self.weight.dtype)
            logits = functional.linear(rows, self.weight)
            if self.training and self.noise_weight is not None:
                spread = functional.softplus(functional.linear(rows, self.noise_weight))
                logits = logits + torch.randn_like(logits) * spread * self.noise
        temperature = self.temperature if self.mode is Mode.dense else 1.0
        probabilities = torch.softmax(logits.float() / temperature, dim=-1)
        if self.mode is Mode.dense:
            gates = probabilities
            chosen = torch.arange(self.experts, device=rows.device).expand(len(rows), -1)
        elif self.training and self.renormalise and self.gate is Gate.annealed:
            highest, chosen = torch.topk(logits.float(), min(2, self.experts), dim=-1)
            gates = torch.softmax(highest / max(self.exponent, COLDEST), dim=-1)
        else:
            selected, chosen = torch.topk(probabilities, self.top_k, dim=-1)
            if not self.renormalise:
                gates = selected
            elif self.top_k == 1:
                # Divided by itself its gradient would be rounding errors, and Adam makes whole steps of those.
                gates = 1.0 + 0.0 * selected
            else:
                gates = selected / selected.sum(dim=-1, keepdim=True)
            if not (self.training and self.renormalise):
                pass
            elif self.gate is Gate.straight_through:
                gates = gates + selected - selected.detach()
            elif self.gate is Gate.switch:
                gates = gates * selected.sum(dim=-1, keepdim=True) ** self.exponent
        if self.training:
            served = (
                chosen if self.mode is Mode.dense else chosen[:, : self.top_k]
            )  # without the second of an annealed gate
            # Computed even if not kept: a checkpointed layer must save the same tensors when it runs again.
            penalty = self._penalty(logits, probabilities, served)
            if self.recording:
                self.penalty = penalty
                self._observe(probabilities.detach(), gates.detach(), served)
        return logits, gates.to(logits.dtype) if self.rounds_gates else gates, chosen

    def take_penalty(self) -> Tensor | None:
        """The penalty of the last recorded pass, once."""
        penalty, self.penalty = self.penalty, None
        return penalty

    def _penalty(self, logits: Tensor, probabilities: Tensor, chosen: Tensor) -> Tensor | None:
        penalty = None
        if self.balance and self.mode is Mode.sparse:
            penalty = self.balance * overload(probabilities, chosen, max_load=self.max_load)
        if self.z_loss:
            extra = self.z_loss * z_loss(logits)
            penalty = extra if penalty is None else penalty + extra
        return penalty

    def _observe(self, probabilities: Tensor, gates: Tensor, chosen: Tensor) -> None:
        self.load += expert_load(chosen, len(self.load), gates if self.mode is Mode.dense else None)
        self.entropy += torch.special.entr(probabilities).sum()
        self.tokens += len(probabilities)

    def take_observations(self) -> tuple[Tensor, Tensor]:
        """(share of the load of each expert (E,), mean entropy of the gate in nats) since the last call."""
        load = self.load / self.load.sum().clamp_min(1.0)
        entropy = self.entropy / self.tokens.clamp_min(1.0)
        for buffer in (self.load, self.entropy, self.tokens):
            buffer.zero_()
        return load, entropy

    def to_stock(self, config: Any) -> nn.Module:
        """The stock router with this one's weight."""
        stock: nn.Module = self.stock_class(config)
        stock.weight = self.weight
        return stock


@torch.no_grad()
def _rounds_gates(stock: Any) -> bool:
    """Whether a stock router rounds its gates to the logits' element type (Qwen3-MoE) or leaves them in float32 (Mixtral)."""
    weight = torch.empty_like(stock.weight, dtype=torch.bfloat16, device="meta")
    _, gates, _ = torch.func.functional_call(stock, {"weight": weight}, (weight[:1],))
    return bool(gates.dtype == torch.bfloat16)
