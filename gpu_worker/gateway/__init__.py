"""The HTTP front of a worker: OpenAI's endpoints over the worker's gRPC. Imports no PyTorch."""
