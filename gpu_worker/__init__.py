"""The GPU worker: runs the model, keeps a slot cache of packed experts, and serves clients."""
