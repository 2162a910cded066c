"""A check of one CUDA device: what runs, how fast, and in how much memory. docs/gpu.md."""
