"""Trainings under Ray Train, and the folders they publish."""
