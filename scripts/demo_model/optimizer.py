"""Optimizers of the demo model: Muon for the blocks' matrices, AdamW for all else, one schedule for both.

Muon (Keller Jordan 2024, "Muon: an optimizer for hidden layers in neural networks") replaces a matrix's
momentum by the nearest orthogonal matrix, here scaled to the usual size of an AdamW update (Liu et al. 2025,
arXiv:2502.16982), so that both take the same learning rate and weight decay. Expert stacks (experts, out, in)
are many matrices, each orthogonalised on its own.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

MUON_ENDINGS = (
    "_proj.weight",
    "_proj",
)  # in, out, q, k, v, o, up, down; not router, embeddings, lm_head, conv1d


class Muon(Optimizer):
    def __init__(
        self, parameters: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape[-2:]].append(parameter)
            for parameters in by_shape.values():
                self._step_same_shape(parameters, group)

    def _step_same_shape(self, parameters: list[nn.Parameter], group: dict) -> None:
        gradients = [p.grad for p in parameters]
        momenta = [self._momentum(p) for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
        rows, columns = parameters[0].shape[-2:]
        stacked = torch.cat([m.reshape(-1, rows, columns) for m in nesterov])
        updates = orthogonalised(stacked).split([p.numel() // (rows * columns) for p in parameters])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        step = -group["lr"] * 0.2 * max(rows, columns) ** 0.5
        torch._foreach_add_(
            parameters, [u.view_as(p) for u, p in zip(updates, parameters, strict=True)], alpha=step
        )

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """(k, rows, columns) to about U V^T of each one's singular value decomposition, by Newton-Schulz steps.

    The coefficients are the published ones: they push singular values into about [0.7, 1.2] in five steps.
    """
    m = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = m.shape[-2] > m.shape[-1]
    m = m.transpose(1, 2) if tall else m
    m = m / (m.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = m @ m.transpose(1, 2)
        m = 3.4445 * m + (-4.7750 * gram + 2.0315 * gram @ gram) @ m
    return (m.transpose(1, 2) if tall else m).to(matrices.dtype)


def make_optimizers(model: nn.Module, lr: float, weight_decay: float) -> list[Optimizer]:
    """Weight decay on matrices alone; norms, biases, A_log, D and dt_bias go free."""
    named = list(model.named_parameters())
    blocks = [p for n, p in named if n.endswith(MUON_ENDINGS)]
    taken = {id(p) for p in blocks}
    rest = [p for _, p in named if id(p) not in taken]
    adamw = AdamW(
        [
            {"params": [p for p in rest if p.dim() >= 2]},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=weight_decay,
        fused=rest[0].is_cuda,
    )
    return [Muon(blocks, lr, weight_decay), adamw]


def set_learning_rate(optimizers: list[Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def learning_rate_factor(progress: float, warm_up: float = 0.02, hold_until: float = 0.3) -> float:
    """Of the peak rate, at a progress from 0 to 1: linear up, level, linear down to 0."""
    if progress < warm_up:
        return (progress + 1e-3) / (warm_up + 1e-3)
    return min(1.0, max(0.0, (1 - progress) / (1 - hold_until)))
