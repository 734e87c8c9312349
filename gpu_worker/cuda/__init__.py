"""Everything that needs an NVIDIA GPU: Triton kernels, the device's slot cache, captured steps, measurements.

Nothing outside this room imports Triton or libcuda, so that a worker on a CPU never waits for either.
`kernels` holds arithmetic alone, each kernel beside the plain PyTorch twin that defines it; the files here
put them together.
"""
