"""Pairs by expert against a stable sort."""

import pytest
import torch

from gpu_worker.cuda.kernels import expert_groups as groups


@pytest.mark.parametrize(("rows", "k", "experts"), [(1, 1, 1), (3, 2, 5), (40, 6, 128), (171, 6, 8)])
def test_equals_its_twin(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, rows: int, k: int, experts: int
) -> None:
    monkeypatch.setattr(groups, "_PAIRS", 256)  # the largest has several parts
    generator = torch.Generator().manual_seed(rows)
    choices = torch.randint(experts, (rows, k), generator=generator).to(device)
    for found, expected in zip(
        groups.expert_groups(choices, experts), groups.expert_groups_plain(choices, experts), strict=True
    ):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_experts_that_nobody_chose_are_empty(device: torch.device) -> None:
    positions, starts = groups.expert_groups(torch.tensor([[3, 1], [3, 3]], device=device), 5)
    assert starts.tolist() == [0, 0, 1, 1, 4, 4]
    assert positions.tolist() == [1, 0, 2, 3]
