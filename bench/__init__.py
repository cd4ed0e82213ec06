"""Performance as ratios within one run."""
