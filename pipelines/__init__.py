"""Ray Data: sources, stages, tables, and the one file that puts Ray round a stage."""
