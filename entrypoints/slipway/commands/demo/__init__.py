"""The demo: the whole flow through the shipped commands (demo.py), and what it proves (checks.py)."""
