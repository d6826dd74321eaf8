"""What an operator asks of the relay and changes in it, for socket, HTTP, page and CLI."""
