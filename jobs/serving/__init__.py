"""Pages at this machine's own address."""
