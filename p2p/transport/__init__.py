"""How messages travel between peers: wire format, relays, and a peer's link to them."""
