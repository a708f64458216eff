"""Adapters: small matrices that learn beside a model's frozen ones, and their merging into these."""
