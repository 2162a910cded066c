"""The command line that jobs share, and where a job's inputs lie."""
