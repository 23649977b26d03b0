"""For maintainers: execute and stamp the notebooks. Nothing here is installed."""
