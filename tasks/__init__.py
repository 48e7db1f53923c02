"""One file per task of evaluate.py; each has run(args), which prints a table and returns it and the sections of its page."""
