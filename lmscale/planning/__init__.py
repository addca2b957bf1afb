"""What a run would need: memory, arithmetic and traffic, computed without making a table."""
