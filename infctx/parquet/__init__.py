"""Parquet columns whose pages are too large for memory: pages on disk in, texts out one by one.

A writer may put a thousand books into one page. pyarrow holds a page whole, twice, so such pages are read here:
decompressed to a temporary file, and from there text by text. Everything else is left to pyarrow.
"""
