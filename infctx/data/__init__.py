"""From text to lanes: text -> tokenizer -> token_store -> document_stream -> lanes.

Imports nothing else of ours but leaves.
"""
