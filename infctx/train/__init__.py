"""Training: start reading in loop.py; window.py has the exact gradient over any length."""
