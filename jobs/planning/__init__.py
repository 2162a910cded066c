"""Forecast of a run: rows, bytes, hours, cost, memory and requests."""
