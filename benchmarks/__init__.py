"""Every figure the README quotes, measured again by one command, the peer and hand-written code beside it."""
