"""Floor 2: memory: telling that it is full, freeing some, and doing the same work with less of it."""
