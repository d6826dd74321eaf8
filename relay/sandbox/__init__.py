"""A sandbox on loopback for `relay demo` and the tests: DNS, mail hosts, certificates."""
