"""Costs of the stages of a run: work, bytes, memory and storage requests."""
