"""Deletion of rows on request, and of files that no reader needs."""
