"""Exact top-k over the catalogue, dense or coded (docs/retrieval.md)."""

from longtrail.retrieval.exact import exact_index
from longtrail.retrieval.factory import build_index
from longtrail.retrieval.index import Exclusion, Filter, Index

__all__ = ["Exclusion", "Filter", "Index", "build_index", "exact_index"]
