"""Ways out of a model: a single file, Apple's layout, a repository on a hub."""
