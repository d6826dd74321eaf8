"""We sign for the sender's domain (DKIM, RFC 6376).

body        the hash of a body of any size, taken in pieces
signature   whether a message is signed, in whose name, and the DKIM-Signature field itself
keys        the private keys, from their files; the record that publishes one
"""
