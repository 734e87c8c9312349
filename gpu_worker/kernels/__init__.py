"""The arithmetic of packed records. Each kernel stands beside a plain PyTorch twin of the same signature."""
