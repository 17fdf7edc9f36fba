"""The command line of the trusted log, and the contract that all programs of this project share."""
