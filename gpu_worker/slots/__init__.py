"""The slot cache: places in device memory for packed experts, and what fills them.

`cache` keeps one layer's slots and their states, `policies` chooses victims, `waves` brings a step's experts
into slots, `routed_experts` computes from them, `fetch` moves records from frame to slot, `hints` tells the
store what comes next.
"""
