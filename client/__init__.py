"""The client: signs requests and accepts what f+1 replicas agree on."""
