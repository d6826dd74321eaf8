"""How secure must this message be: settings and where each came from, rules by domain, header
fields.
"""
