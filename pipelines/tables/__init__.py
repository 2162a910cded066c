"""Delta tables that are filled exactly once."""
