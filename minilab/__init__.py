"""The mini laboratory: a rendered world of known truth, its generators, and models trained on it."""
