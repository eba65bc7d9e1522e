"""Experts whose gates are the router's probabilities, made to add up to what they do under gates that sum to one.

Shapes: T tokens, E experts, K experts a token, D hidden width.
"""

import torch
from torch import Tensor, nn

from dive.config import Gates
from dive.moe.layer import CHUNK, ExpertLayer, convert, gates_of, selected_outputs
from dive.ranks import ALONE, Ranks

RIDGE = 1e-4
"""Of the scales, as a share of an expert's mean energy: what draws those that tokens hardly tell apart to a common one."""


@torch.no_grad()
def scaled_to_gates(
    layer: ExpertLayer, act: nn.Module, inputs: Tensor, targets: Tensor, *, top_k: int, ranks: Ranks = ALONE
) -> ExpertLayer:
    """The layer with the down projection of each expert e times s_e, the least squares under the gates p of the chosen experts C.

    s minimises Σ_t ‖y_t − Σ_{e ∈ C_t} p_te s_e expert_e(x_t)‖². Of one expert a token that is
    s_e = Σ p y·expert_e(x) / Σ p² ‖expert_e(x)‖² over its tokens. An expert that no token chooses gets the scale that is best
    for all together.

    Args:
        inputs: x, (T, D).
        targets: y, (T, D).
        ranks: the processes that have tokens, each its own.
    """
    whole = convert(layer, torch.float32)
    device, experts = whole.down.device, len(whole.masks)
    gram = torch.zeros(experts, experts, dtype=torch.float64, device=device)
    cross = torch.zeros(experts, dtype=torch.float64, device=device)
    for rows, wanted in zip(inputs.split(CHUNK), targets.split(CHUNK), strict=True):
        x, y = rows.to(device, torch.float32), wanted.to(device, torch.float32)
        gates, chosen = gates_of(x @ whole.router.T, Gates.probabilities, top_k=top_k)
        outputs = selected_outputs(whole, act, x, chosen)
        if whole.bias is not None:
            outputs = outputs + whole.bias[chosen]
        outputs = outputs * gates[..., None]
        pairs = (chosen[:, :, None].expand(-1, -1, top_k), chosen[:, None, :].expand(-1, top_k, -1))
        gram.index_put_(pairs, (outputs @ outputs.transpose(1, 2)).double(), accumulate=True)
        cross.index_put_((chosen,), (outputs @ y[..., None]).squeeze(-1).double(), accumulate=True)
    gram, cross = ranks.sum(gram), ranks.sum(cross)
    common = cross.sum() / gram.sum().clamp_min(1e-30)
    ridge = torch.eye(experts, dtype=torch.float64, device=device) * (RIDGE * gram.diagonal().mean()).clamp_min(1e-30)
    scales = common + torch.linalg.solve(gram + ridge, cross - gram @ common.expand(experts))
    down = whole.down * scales[:, None, None].float()
    bias = None if whole.bias is None else whole.bias * scales[:, None].float()
    return ExpertLayer(
        masks=layer.masks,
        gate_up=layer.gate_up,
        down=down.to(layer.down),
        router=layer.router,
        bias=None if bias is None else bias.to(layer.down),
    )
