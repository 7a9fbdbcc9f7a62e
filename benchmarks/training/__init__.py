"""How fast, and in how much memory, models are trained: users or samples per second of processor time, beside textbook twins in the same run."""
