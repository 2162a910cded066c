"""Entry points of `ray job submit`, one per verb, and the recipes."""
