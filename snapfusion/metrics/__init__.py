"""Evaluation metrics: FID, CLIP score, decoder fidelity, and their confidence intervals."""
