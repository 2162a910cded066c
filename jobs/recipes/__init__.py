"""Recipes: complete runs as typed settings."""
