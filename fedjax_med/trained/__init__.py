"""Uses of a trained model: predictions, exports, pictures of where it looks."""
