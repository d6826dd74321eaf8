"""We hand mail on: attempts at hosts, connections, and the scheduler that paces them."""
