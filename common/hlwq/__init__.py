"""HLWQ: Hadamard-Lloyd weight quantization (arXiv:2603.29078), as plain PyTorch.

`codebook` holds the centroids, `hadamard` the rotation, `planes` the packed form of codes, `quantize`
the way in, `matrix` one packed matrix and the way out. Nothing here knows files, records or processes.
"""
