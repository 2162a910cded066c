"""Exports of tables in the layouts that other training programs read."""
