"""What launchers say about a cluster of processes: one function for each launcher, one file for each family."""
