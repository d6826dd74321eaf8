"""The words of mail: address, envelope, reply, outcome, event, header bytes. Imports nothing of
ours.
"""
