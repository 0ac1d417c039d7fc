"""First stages and indexes; each one makes a `Run`."""
