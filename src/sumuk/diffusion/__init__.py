"""Floor 1: the mathematics of diffusion. Noise is a pair, a solver asks, a grid spaces; no network lives here.

Read in this order: schedule, prediction, solver, sample.
"""
