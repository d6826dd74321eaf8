"""Signs messages for the sender's domain (DKIM, RFC 6376).

body        the hash of a body of any size, computed from its pieces
signature   whether a message is signed, in whose name, and the DKIM-Signature field itself
keys        reads private keys from files, and writes the DNS record that publishes one
"""
