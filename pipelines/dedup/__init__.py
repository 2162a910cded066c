"""Duplicates within a data set, and overlap with an evaluation set."""
