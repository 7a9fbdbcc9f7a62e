"""Longtrail: from a log of what people saw and clicked to an A/B-tested recommender that reads whole histories."""
