"""The relay and a Postfix beside it, under the same load: `make bench`."""
