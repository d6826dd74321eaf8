"""What the relay does with a message that comes in, over SMTP as over HTTP.

message        judges and rewrites a header section; makes the message that the queue holds
options        what a message asks for besides security: when it is sent, tags, test mode
trace          the Received field, and the fields that a client left out
failures       how often a password may be wrong, and which passwords are checked after that
secrets        checks a password or key
log_limit      limits the log lines about clients that break the protocol
certificates   the TLS context and the certificate for clients
"""
