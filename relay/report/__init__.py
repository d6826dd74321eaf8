"""We say what became of it: delivery status notifications and the delivery log."""
