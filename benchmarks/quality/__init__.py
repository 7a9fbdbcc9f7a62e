"""The quality board: every model on real data, unsampled, with several seeds. `python -m benchmarks.quality --help`; results in docs/quality.md."""
