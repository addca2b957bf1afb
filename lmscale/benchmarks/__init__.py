"""What `lmscale.bench` measures: lmscale beside what a user would otherwise pick, and beside the machine's limits."""
