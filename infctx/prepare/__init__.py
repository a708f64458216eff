"""`infctx prepare`: documents in, token stores out."""
