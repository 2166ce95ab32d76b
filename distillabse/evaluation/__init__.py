"""What was kept, and how fast it is: fidelity, latency and the report."""
