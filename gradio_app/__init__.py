"""The comparison app: type a prompt, move the ratio, look at both pictures."""
