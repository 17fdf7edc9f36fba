"""Replication with 2f+1 replicas, each of which is its attested log."""
