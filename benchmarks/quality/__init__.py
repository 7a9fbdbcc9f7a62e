"""The quality board: every model on real data, unsampled, with several seeds. `python -m benchmarks.quality --help`; docs/quality.md."""
