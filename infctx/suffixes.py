"""What the suffix of a file says about it; of several files with the same documents, the kinds named first are best."""

FORMATS_BY_SUFFIX = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".md": "text",
}
COMPRESSIONS = (".gz", ".zst")
