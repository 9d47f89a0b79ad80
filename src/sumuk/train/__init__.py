"""Floor 5: training. A recipe says which parameters, what batch, what loss; the loop is the same for all."""
