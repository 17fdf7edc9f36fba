"""A cluster on disk: its public file, its keys, a replica's private folder, and the making of all three."""
