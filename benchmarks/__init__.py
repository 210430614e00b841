"""Benchmarks: each prints one table, ours and the limit or a peer side by side, measured in one run.

Run one as `python -m benchmarks.NAME`; `--help` lists its flags.
"""
