"""The command `trustlog-client`."""
