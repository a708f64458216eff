"""Training: start reading at loop.py; the exact gradient over any length is in window.py."""
