"""Text to batches. `supply.open_data` is the door; `loader.Loader` and `prefetch` give the batches of a run."""
