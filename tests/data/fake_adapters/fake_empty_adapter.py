"""A module that an entry point names although it holds no hook."""
