"""Text to vocabulary to token files to batches, a pure function of the step."""
