"""Networks, and the bundle that holds a complete Stable Diffusion."""
