"""Everything that needs an NVIDIA GPU: Triton kernels, the device's slot cache, captured steps, measurements.

Nothing outside imports this room, Triton or libcuda but where there is a GPU: a worker on a CPU waits for
neither.
`kernels` holds arithmetic alone, each kernel beside the plain PyTorch twin that defines it; the files here
put them together.
"""
