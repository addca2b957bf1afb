"""The core: the sharded table, its samplers, losses and row optimizers."""
