"""One thread for tests of small models: on busy cores, several wait for each other five times as long.

Kernels of the GPU are tested on one if there is one, else on the CPU under Triton's interpreter, which has to
be chosen before anything imports Triton.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
