"""Where a run's numbers go besides its events: JSON lines always, trackers when the settings name them."""
