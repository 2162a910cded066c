"""Fetches images from the open web with img2dataset, inside img2dataset's own environment.

These modules run there, so they import the standard library, img2dataset, and nothing else of this project.
"""
