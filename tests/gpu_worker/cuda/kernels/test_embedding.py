"""Rows of page-locked embeddings against PyTorch's look-up."""

import pytest
import torch

from gpu_worker.cuda.kernels.embedding import embedding, embedding_plain


@pytest.mark.parametrize("hidden", [40, 2688])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_come_from_the_host(hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    weight = torch.randn(50, hidden).bfloat16()
    tokens = torch.tensor([3, 0, 49, 3])
    placed = weight.pin_memory() if device.type == "cuda" else weight
    found = embedding(tokens.to(device), placed, dtype)
    assert found.dtype == dtype
    assert torch.equal(found.cpu(), embedding_plain(tokens, weight, dtype))
