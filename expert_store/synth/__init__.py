"""Synthetic checkpoints: a real model's shapes filled with random weights, for benchmarks without a download.

`shapes` knows the architectures, `records` draws matrices in packed form, `dense` says how large each weight
is and draws what is no matrix, `router` gives experts a stated popularity, `tokenizer` makes a small
tokenizer, and `source` puts them together as a `WeightSource`, which the packed writer writes like any other.
"""
