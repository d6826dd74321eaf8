"""Receives mail from clients: session, access, the checks in order, and the listener."""
