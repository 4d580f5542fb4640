"""Searches: grids of configs, trials run by workers or as populations, and a journal of what they scored."""

from functrain.search.grid import Grid, grid, nested
from functrain.search.result import SearchResult
from functrain.search.search import grid_search
from functrain.search.trial import Scored

__all__ = ["Grid", "Scored", "SearchResult", "grid", "grid_search", "nested"]
