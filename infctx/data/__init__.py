"""From a token store to the rows of a batch: tokenizer -> token_store -> document_stream -> lanes."""
