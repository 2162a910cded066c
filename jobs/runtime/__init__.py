"""Process-level services of a job: exit codes, credentials, the Ray cluster, progress."""
