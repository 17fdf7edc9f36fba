"""The command `trustlog-replica`: makes clusters and runs replicas."""
