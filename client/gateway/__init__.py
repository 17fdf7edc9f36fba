"""Front doors for programs that speak Redis' protocol or HTTP instead of this project's own.

A gateway is a client: it holds a client's key, sends signed envelopes, and checks itself that f+1 replicas answer
alike. So whoever uses it trusts it as far as its own program; run it beside the application, one per host, on loopback.

    resp.py         Redis' protocol: cutting commands out of a byte stream under hard limits, encoding replies
    table.py        the commands as a table: name, arity, handler, documentation
    keys.py, connection_commands.py, transactions.py    the commands
    session.py      one conversation: what a pipeline, a transaction and an unknown outcome mean
    connection.py   one TCP connection: bounded buffers in both directions, deadlines
    server.py       the listeners, and what connections share
    http.py         HTTP/JSON
"""
