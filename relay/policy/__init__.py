"""How secure a message must be: the settings and their sources, rules by domain, header fields."""
