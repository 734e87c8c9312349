"""The fuzz: random and mutated input at every door; no crash, no hang, no INTERNAL, no traceback to anyone.

`scripts/fuzz` (or `python -m tests.fuzz`) runs it at length; a short form of it is
`tests/system/test_fuzz.py`. The doors are `rpc` (both gRPC services), `frames` (the store's ZeroMQ socket),
`http` (the gateway) and `files` (checkpoints). Each case is made from the door's name, the seed and its
number alone, so that one that fails can be had again. `mutate` damages bytes and JSON for all of them.
"""
