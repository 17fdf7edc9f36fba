"""PBFT as a baseline: the machine, and replicas that run it as a real cluster."""
