"""Delivers mail: attempts at hosts, connections, and the scheduler that paces them."""
