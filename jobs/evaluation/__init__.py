"""Comparison of models, and measurements of speed and memory."""
