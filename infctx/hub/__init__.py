"""The hub: names of repositories in; their files, downloaded once and checked, out.  All through huggingface_hub."""
