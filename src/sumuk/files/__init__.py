"""Floor 1: bytes on disk. Strict headers, lazy tensors, atomic writing, reversible layouts. No networks."""
