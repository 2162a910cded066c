"""HTML reports, charts and tables of finished runs."""
