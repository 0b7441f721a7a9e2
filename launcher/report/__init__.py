"""A run's report: `telling` turns events into a `history`, `figure` draws it, `page` writes it."""
