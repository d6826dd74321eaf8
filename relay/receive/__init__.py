"""A client gives us mail: session, access, the checks in order, and the listener."""
