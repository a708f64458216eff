"""Prints documents that every machine with infctx has, as jsonl with the key `text`.

    python    the standard library's long source files, tests left out; first of them `pydoc_data/topics.py` (the
              language reference, about 0.7 MB in one document)
    cpp       the long C++ headers that come with torch

For example:

    python tools/example_documents.py python | infctx prepare - --format jsonl --tokenizer bytes --output data/python
"""

import argparse
import json
import sys
from io import TextIOWrapper
from typing import cast

from infctx.documents.example_documents import MIN_BYTES, cpp_documents, python_documents


def main() -> None:
    """Writes the documents to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("python", "cpp"))
    parser.add_argument(
        "--min-bytes", type=int, default=MIN_BYTES, help="leave out files below this (default: %(default)s)"
    )
    arguments = parser.parse_args()
    documents = {"python": python_documents, "cpp": cpp_documents}[arguments.kind](arguments.min_bytes)
    cast(TextIOWrapper, sys.stdout).reconfigure(encoding="utf-8", newline="\n")
    for name, text in documents:
        print(json.dumps({"text": text, "source": name}, ensure_ascii=False))


if __name__ == "__main__":
    main()
