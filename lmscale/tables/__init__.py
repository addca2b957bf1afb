"""Tables: rows of a vocabulary, sharded over the devices, and how they travel."""
