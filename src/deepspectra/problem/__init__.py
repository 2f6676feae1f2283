"""What is given: model, loss and data, as one bundle that is checked once."""
