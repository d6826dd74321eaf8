"""Real programs for the system tests: Postfix, Knot DNS, and the relay as a process of its own."""
