"""The figures of the pages: what they show of fidelity, of speed, of both, and of training."""
