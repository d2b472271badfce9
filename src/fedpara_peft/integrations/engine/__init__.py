"""What every engine shares: a node, a server, what they tell each other. It knows no engine."""
