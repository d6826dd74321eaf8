"""A message comes in, by whichever door: what is written on top of it, what is taken off, what is
kept.

message        a header section judged and rewritten; the message as the queue will hold it
options        when a message is to go out, its tags, test mode: header fields and values
trace          the Received field, the fields a client left out, hops counted
failures       how often a password may be wrong, and what is looked at after that
secrets        whether a password or key is right
oddities       how much the log may hold about clients that do not behave
certificates   what TLS we speak with a client, and with which certificate
"""
