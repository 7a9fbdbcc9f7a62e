"""Offline evaluation of policies from logs: estimators, intervals, diagnostics, verdict. Arrays in, figures out; knows no models and no files."""
