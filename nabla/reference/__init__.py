"""The oracle: plain PyTorch, on any device, in any precision; slow and obviously right."""
