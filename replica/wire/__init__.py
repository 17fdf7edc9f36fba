"""What travels between programs: frames, messages, TLS with pinned certificates, the opening handshake."""
