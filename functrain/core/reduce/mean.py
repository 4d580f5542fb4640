"""The mean over examples, and their sum: the linear reducers."""

from __future__ import annotations

from functrain.core.reduce.base import Reducer, add, mean_of

mean = Reducer("mean", merge=add, finish=mean_of, linear=True)
"""The weighted mean Σ wᵢ gᵢ / Σ wᵢ over all examples, whatever the sizes of the parts: divided once, at the end."""

sum = Reducer("sum", merge=add, finish=lambda total: total, linear=True)
"""The sum Σ wᵢ gᵢ over all examples; loss and aux are sums too."""
