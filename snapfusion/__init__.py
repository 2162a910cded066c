"""The method: schedules, sampling, losses, models, training and export. Imports neither Ray nor pyarrow."""
