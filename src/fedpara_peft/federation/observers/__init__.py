"""Who watches a run: callbacks, progress bars, trackers."""
