"""An SMTP smarthost that controls, enforces and explains TLS to the next hop."""

__version__ = "1.0.0"
