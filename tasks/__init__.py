"""One file per task of evaluate.py; each has run(args) -> results, which prints a table and returns what it prints."""
