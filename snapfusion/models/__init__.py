"""Networks, and the bundle that holds a whole Stable Diffusion."""
