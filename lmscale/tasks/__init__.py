"""Tasks: what a model reads, predicts and is measured by, one file each."""
