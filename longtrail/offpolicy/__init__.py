"""Offline evaluation of policies from logs: estimators, intervals, diagnostics, verdict. Arrays in, figures out; knows no models.

Only `stream.py` reads files: logs too large for memory.
"""
