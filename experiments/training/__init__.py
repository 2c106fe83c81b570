"""One training run: its steps, its loop, what it keeps and reports."""
