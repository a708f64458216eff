"""The version of infctx: of the package, the command line, and what a run and its report were made with."""

__version__ = "0.1.0"
