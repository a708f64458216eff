"""Runs as pages: the files in runs' folders in; one page that shows them, its figures, and their numbers out."""
