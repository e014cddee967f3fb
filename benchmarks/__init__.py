"""Speed and memory as ratios, each against a named baseline measured in the same run."""
