"""From text to lanes: inputs -> text -> tokenizer -> token_store -> document_stream -> lanes.

Imports nothing of ours but the leaves.
"""
