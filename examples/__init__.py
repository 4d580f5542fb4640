"""Complete programs on real data, each run by the tests."""
