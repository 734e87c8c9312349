"""transformers' side of `five_blocks`: loads a directory in bfloat16, then times generations, one a line."""

from __future__ import annotations

import json
import sys
import time

import torch
from transformers import NemotronHForCausalLM
from transformers.utils import logging


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = NemotronHForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
    for line in sys.stdin:
        request = json.loads(line)
        prefill, decode = measure(model, torch.tensor([request["prompt"]]), request["new"])
        print(json.dumps({"prefill": prefill, "decode": decode}), flush=True)


@torch.inference_mode()
def measure(model: NemotronHForCausalLM, prompt: torch.Tensor, new: int) -> tuple[float, float]:
    """Seconds until the first new token, and from there to the last, decoding greedily."""
    started = time.perf_counter()
    output = model(prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    token.item()  # waits for a GPU
    prefilled = time.perf_counter()
    for _ in range(new - 1):
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    token.item()
    return prefilled - started, time.perf_counter() - prefilled


if __name__ == "__main__":
    main()
