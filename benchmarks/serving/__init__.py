"""Latency at the endpoint under open-loop load: the packaged service beside the same model in a bare framework, a tiled model, and nothing at all."""
