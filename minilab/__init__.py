"""The mini laboratory: a rendered world, small generators that imitate it, and the models of preset mini."""

import itemkit  # noqa: F401  (lets torchvision be imported beside a CPU-only torch)
