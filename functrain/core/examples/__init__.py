"""Gradients of single examples: taken together, used one by one."""

from functrain.core.examples.gradients import check_lanes, checked_budget, example_grads, plan_of, scaled_sum

__all__ = ["check_lanes", "checked_budget", "example_grads", "plan_of", "scaled_sum"]
