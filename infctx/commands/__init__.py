"""The commands of the command line: for each, a function that describes its options and one that runs it."""
