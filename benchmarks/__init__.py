"""Each benchmark prints a table against a rival measured in the same run, and writes JSON."""
