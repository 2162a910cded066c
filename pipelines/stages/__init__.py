"""Stages of the main job as plain callables."""
