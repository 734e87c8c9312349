"""The slot cache: places in device memory for packed experts, and what fills them.

`cache` keeps one layer's slots and their states, `policies` chooses victims, `routed_experts` computes from
slots in waves, `fetch` moves records from frame to slot, `hints` tells the store what comes next.
"""
