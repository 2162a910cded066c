"""Training of the miniature: consecutive stages, each resumable by itself."""
