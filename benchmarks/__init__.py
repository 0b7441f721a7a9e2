"""Performance claims, each measured side by side with something else in one run, as JSON."""
