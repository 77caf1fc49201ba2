"""Training of the shipped networks; nothing outside this package imports it."""
