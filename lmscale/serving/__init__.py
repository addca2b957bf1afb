"""What was trained, as a SavedModel."""
