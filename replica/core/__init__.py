"""The ordering protocol as a pure state machine: events in, effects out.

Nothing here does input or output, reads a clock, draws a random number, holds a private key or knows asyncio;
`make check` enforces it. The daemon, the tests and later the simulator all run this very code.
"""
