"""Parameters: how each starts, and how it is updated."""
