"""The miniature: a small Stable Diffusion of procedural scenes, with its training recipe and weights."""
