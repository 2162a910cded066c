"""From committed tables to global batches."""
