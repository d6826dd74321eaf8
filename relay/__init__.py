"""An SMTP smarthost that controls, enforces and explains TLS to the next hop."""

__version__ = "0.1.0"
