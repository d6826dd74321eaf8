"""The values of mail: address, envelope, reply, outcome, event, header section.

This package imports no other package of the relay.
"""
