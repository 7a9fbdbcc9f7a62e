"""The BentoML service and what it needs at run time."""
