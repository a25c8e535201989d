"""What happens to an update between client and server: transforms, and the rule that joins them."""
