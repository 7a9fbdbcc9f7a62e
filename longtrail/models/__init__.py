"""Models: pure torch modules in four slots (items, attention, encoders, rankers). They know no files, devices or optimisers."""
