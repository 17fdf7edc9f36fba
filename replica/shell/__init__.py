"""The daemon around the core: sockets, disk, clock and keys.

daemon.py    starts and stops one replica
node.py      hands events to the core and carries out its effects
outbox.py    the one door: durable, then attested, then released
store.py     the SQLite file
streams.py   lets others read logs
server.py    accepts peers and clients
links.py     reads peers' logs
verify.py    signatures of groups and envelopes
status.py    what a replica says of itself
"""
