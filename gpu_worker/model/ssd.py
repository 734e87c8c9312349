"""Mamba-2 state space dual scan: a chunk form for whole prompts, a step form for decode.

Source: Dao and Gu 2024, "Transformers are SSMs" (arXiv:2405.21060). Per head, with decay a_t = exp(dt_t A):

    state_t = a_t state_{t-1} + dt_t x_t B_t^T          y_t = state_t C_t + D x_t

Shapes: b sequences, t tokens, h heads of p channels, g groups of r = h/g heads that share B and C, n state
entries. Everything is computed in float32 whatever comes in; y leaves in x's dtype. All three functions are
differentiable.

Not done here: projections, the convolution, softplus and clamping of dt, gating. Autocast must be off around
these calls, since it would lower the matmuls to its own dtype. `ssd_chunk_scan` holds a few tensors of (b, h,
t, chunk_size) float32, so callers bound t by feeding a long prompt in pieces through `initial_state`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan as matmuls: x (b,t,h,p), dt (b,t,h) >= 0, A (h) < 0, B and C (b,t,g,n), D (h), any t >= 1.

    Returns y (b,t,h,p) in x.dtype and the state after the last token (b,h,p,n) float32.
    """
    t, h, p = x.shape[1:]
    g, n = B.shape[2:]
    # Padding is at the end with dt = 0: decay 1 and no input, so the final state passes through it unchanged.
    pad = -t % chunk_size
    xf = _chunked(x, pad, chunk_size)
    B, C = (_chunked(m, pad, chunk_size).transpose(2, 3) for m in (B, C))  # (b,c,g,l,n)
    dt = _chunked(dt, pad, chunk_size)
    # float64 for the running sum alone (b,t,h): decays are exp of differences of it, and where one huge dt
    # precedes small ones a float32 sum would have lost the digits that those differences are made of.
    log_decay = (dt.double() * A.double()).cumsum(2).transpose(2, 3)  # (b,c,h,l)
    within = _decay_between(log_decay).unflatten(2, (g, -1))  # (b,c,g,r,l,s)
    from_start = log_decay.float().exp()
    to_end = (log_decay[..., -1:] - log_decay).float().exp()

    inputs = (xf * dt[..., None]).transpose(2, 3)  # (b,c,h,l,p)
    scores = C @ B.transpose(-1, -2)  # (b,c,g,l,s): once a group, not once a head
    y = ((scores[:, :, :, None] * within).flatten(2, 3) @ inputs).transpose(2, 3)

    # A group's heads side by side make one matmul a group: (r p, l) @ (l, n).
    weighted = (inputs * to_end[..., None]).transpose(-1, -2).unflatten(2, (g, -1)).flatten(3, 4)
    added = (weighted @ B).reshape(*weighted.shape[:2], h, p, n)
    starts, state = _carry(added, from_start[..., -1], initial_state)

    carried = C @ starts.unflatten(2, (g, -1)).flatten(3, 4).transpose(-1, -2)  # (b,c,g,l,r p)
    carried = carried.unflatten(-1, (-1, p)).transpose(2, 3).flatten(3, 4)  # (b,c,l,h,p)
    y = y + carried * from_start.transpose(2, 3)[..., None] + xf * D.float()[:, None]
    return y.flatten(1, 2)[:, :t].to(x.dtype), state


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: x (b,h,p), dt (b,h), B and C (b,g,n), state (b,h,p,n) float32. Returns y and a new state."""
    g, n = B.shape[1:]
    b, h, p = x.shape
    xf, dt = x.float(), dt.float()
    decay = (dt * A.float()).exp()[..., None, None]
    per_group = (b, g, h // g, p, n)
    added = (xf * dt[..., None]).view(*per_group[:4], 1) * B.float()[:, :, None, None]
    state = state.float() * decay + added.view(b, h, p, n)
    y = (state.view(per_group) @ C.float()[:, :, None, :, None]).view(b, h, p)
    return (y + xf * D.float()[:, None]).to(x.dtype), state


def ssd_sequential(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain twin of `ssd_chunk_scan`: one `ssd_step` a token. `chunk_size` only completes the signature."""
    b, t, h, p = x.shape
    state = x.new_zeros(b, h, p, B.shape[-1], dtype=torch.float32) if initial_state is None else initial_state
    outputs = []
    for i in range(t):
        y, state = ssd_step(x[:, i], dt[:, i], A, B[:, i], C[:, i], D, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def _chunked(m: Tensor, pad: int, chunk_size: int) -> Tensor:
    """(b, t, ...) to (b, c, chunk_size, ...) float32, zeros after the last token."""
    m = F.pad(m.float(), (0, 0) * (m.dim() - 2) + (0, pad))
    return m.unflatten(1, (-1, chunk_size))


def _decay_between(log_decay: Tensor) -> Tensor:
    """(..., l) running log decay to (..., l, s): exp(log_l - log_s) for s <= l, 0 above the diagonal.

    The mask goes in before exp. Above the diagonal the difference is positive and may overflow to inf, and a
    mask multiplied in afterwards would give inf * 0 = NaN in forward and backward alike.
    """
    length = log_decay.shape[-1]
    above = torch.ones(length, length, dtype=torch.bool, device=log_decay.device).triu(1)
    between = (log_decay[..., :, None] - log_decay[..., None, :]).float()
    return between.masked_fill_(above, -torch.inf).exp_()


def _carry(added: Tensor, decay: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """added (b,c,h,p,n), decay of whole chunks (b,c,h): state before each chunk (b,c,h,p,n), and the last."""
    state = torch.zeros_like(added[:, 0]) if initial_state is None else initial_state.float()
    starts = []
    for i in range(added.shape[1]):
        starts.append(state)
        state = state * decay[:, i, :, None, None] + added[:, i]
    return torch.stack(starts, dim=1), state
