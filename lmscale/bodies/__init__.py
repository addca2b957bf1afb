"""Bodies: [batch, time, embed_dim] -> [batch, time, hidden]."""
