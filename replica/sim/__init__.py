"""The deterministic simulator: real cores in a virtual world that tries to break them (see `replica.sim.run`)."""
