"""Deletion requests: lineage of deleted rows, and receipts."""
