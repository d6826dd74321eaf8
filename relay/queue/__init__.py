"""We are responsible for it: entries, retry, settlement, and the store that keeps them."""
