"""The only users of Ray Data."""
