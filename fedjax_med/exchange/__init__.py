"""The way of an update from client to server: transforms, and aggregators of all updates."""
