"""A message comes in, by whichever door: what is written on top of it, what is taken off, what is
kept.

message    a header section judged and rewritten; the message as the queue will hold it
trace      the Received field, the fields a client left out, hops counted
failures   who may try a password again, and when
"""
