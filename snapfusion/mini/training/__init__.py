"""How the miniature is trained: stages in order, each resumable by itself."""
