"""The tasks of evaluate.py, one file each.

Each has run(job), which prints a table and returns (what it found, the sections of its page).
"""
