"""The compiled program: clients on one axis, rounds on another."""
