"""A closed sandbox for `relay demo` and the tests: DNS, mail hosts and certificates of every kind."""
