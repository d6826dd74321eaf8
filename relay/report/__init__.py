"""Reports results: delivery status notifications, delivery log, metrics, reports on TLS."""
