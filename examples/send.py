"""Send one message to a relay: `python3 examples/send.py FROM TO [HOST:PORT]`.

The script needs only Python's standard library.
"""

import smtplib
import sys
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate, make_msgid

sender, recipient, where = (*sys.argv[1:], "127.0.0.1:2525")[:3]
host, _, port = where.rpartition(":")

message = EmailMessage()
message["From"], message["To"] = sender, recipient
message["Subject"] = "Hello through the relay"
message["Date"], message["Message-ID"] = formatdate(), make_msgid(domain="client.example")
message["X-Require-TLS"] = "yes"  # this message must be encrypted; the relay takes the field out
message.set_content("Sent by examples/send.py\n")

with smtplib.SMTP(host, int(port), timeout=30) as client:
    client.ehlo("client.example")
    client.mail(sender)
    client.rcpt(recipient)
    code, text = client.data(message.as_bytes(policy=SMTP))
print(code, text.decode())
sys.exit(0 if code == 250 else 1)
